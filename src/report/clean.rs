//! Text from datasets, registries, file names and users -> text that is safe on a terminal and in a log that is kept.

use std::borrow::Cow;
use std::sync::{PoisonError, RwLock};

/// Keys behind the `?` of a dataset of the hub, `hf://datasets/OWNER/NAME?config=NAME`. They hold no secret.
const OF_DATASETS: [&str; 2] = ["config", "split"];
/// Keys behind the `#` of an entry of data. They hold no secret.
const OF_ENTRIES: [&str; 5] = ["sha256", "layout", "weight", "limit", "name"];
/// LIMIT: a shorter secret is a word that a message may hold by chance.
const SECRET_BYTES_MIN: usize = 6;
/// Secrets that no text may show.
static SECRETS: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Masks a secret in every text from now on: servers quote what they were sent.
pub fn never_show(secret: &str) {
    let secret = secret.trim();
    let mut secrets = SECRETS.write().unwrap_or_else(PoisonError::into_inner);
    if secret.len() >= SECRET_BYTES_MIN && !secrets.iter().any(|known| known == secret) {
        secrets.push(secret.to_owned());
        // A secret may be a part of another one.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }
}

fn without_known(text: &str) -> Cow<'_, str> {
    let secrets = SECRETS.read().unwrap_or_else(PoisonError::into_inner);
    secrets.iter().fold(Cow::Borrowed(text), |text, secret| match text.contains(secret.as_str()) {
        true => Cow::Owned(text.replace(secret.as_str(), "***")),
        false => text,
    })
}

/// Replaces control characters and marks that reorder text by visible escapes, so that text from a row or a server
/// cannot mislead a terminal or a reader. Removes the secrets of addresses, and cuts texts that are longer than
/// `characters_max`.
pub fn clean(text: &str, characters_max: usize) -> String {
    let text = &without_secrets(text);
    let mut cleaned = String::new();
    for (index, letter) in text.chars().enumerate() {
        if index == characters_max {
            cleaned.push('…');
            break;
        }
        match letter {
            '\t' => cleaned.push(' '),
            letter if letter.is_control() || reorders(letter) => cleaned.extend(letter.escape_default()),
            letter => cleaned.push(letter),
        }
    }
    cleaned
}

fn reorders(letter: char) -> bool {
    matches!(letter, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Removes user, password and query from every address in the text, including mistyped addresses. Masks words that look
/// like tokens, and the secrets of `never_show`. Code that knows an address removes its secrets itself; this function
/// catches what such code missed.
pub fn without_secrets(text: &str) -> String {
    let text = &*without_known(text);
    let is_border = |letter: char| letter.is_whitespace() || matches!(letter, '"' | '\'' | '`' | '<' | '>');
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let word_end = rest.find(is_border).unwrap_or(rest.len());
        out.push_str(&bare_word(&rest[..word_end]));
        rest = &rest[word_end..];
        let next_word = rest.find(|letter| !is_border(letter)).unwrap_or(rest.len());
        out.push_str(&rest[..next_word]);
        rest = &rest[next_word..];
    }
    out
}

fn bare_word(word: &str) -> Cow<'_, str> {
    if !word.contains(['@', '?', '#', '_', '.']) {
        return Cow::Borrowed(word);
    }
    let (head, body) = word.split_at(scheme_end(word));
    let is_address = !head.is_empty();
    let (body, had_user) = without_user(head, body);
    let body = without_query(head, body, is_address || had_user);
    match without_tokens(&body) {
        Some(masked) => Cow::Owned(format!("{head}{masked}")),
        None if !had_user && head.len() + body.len() == word.len() => Cow::Borrowed(word),
        None => Cow::Owned(format!("{head}{body}")),
    }
}

/// Returns the position behind `https://`, or behind one of its mistyped forms `https//`, `https:/` and `https:`.
fn scheme_end(word: &str) -> usize {
    if let Some(at) = word.find("//") {
        return at + 2;
    }
    let known = ["https:/", "http:/", "https:", "http:"];
    known.iter().find_map(|scheme| word.find(scheme).map(|at| at + scheme.len())).unwrap_or(0)
}

/// Removes the user. The text before the last `@` is a user if it contains a password, or if an address begins with
/// it. A digest or a revision behind the `@` means that there is no user: `host/name@sha256:...`,
/// `hf://owner/name@main`.
fn without_user<'a>(head: &str, body: &'a str) -> (&'a str, bool) {
    let Some((user, host)) = body.rsplit_once('@') else { return (body, false) };
    let is_digest = ["sha256:", "sha512:"].iter().any(|name| host.starts_with(name));
    let alone = !head.is_empty() && !head.ends_with("hf://") && !user.contains('/');
    match !is_digest && (user.contains(':') || alone) {
        true => (host, true),
        false => (body, false),
    }
}

/// Returns whether the text behind the `?` of `hf://` chooses a part of a dataset.
pub fn is_of_dataset(query: &str) -> bool {
    has_only(query.split('#').next().unwrap_or(query), &OF_DATASETS)
}

/// Returns whether the text behind a `#` is the settings of an entry of data.
pub fn is_of_entry(fragment: &str) -> bool {
    has_only(fragment, &OF_ENTRIES)
}

fn has_only(pairs: &str, keys: &[&str]) -> bool {
    pairs.split('&').all(|pair| pair.split_once('=').is_some_and(|(key, _)| keys.contains(&key)))
}

/// Removes a query that chooses no part of a dataset, and a fragment that is no setting of an entry. Punctuation at the
/// end belongs to the sentence and stays.
fn without_query<'a>(head: &str, body: &'a str, is_address: bool) -> Cow<'a, str> {
    let is_query = |query: &str| {
        let name = query.split_once('=').map_or("", |(name, _)| name);
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte))
    };
    let query = body.split_once('?').filter(|(_, query)| is_address || is_query(query));
    let query = query.filter(|(_, query)| !(head.ends_with("hf://") && is_of_dataset(query)));
    let fragment = || {
        let (path, fragment) = body.split_once('#').filter(|_| is_address)?;
        (!is_of_entry(fragment)).then_some(path)
    };
    let query = query.map(|(path, _)| path);
    match query.or_else(fragment) {
        None => Cow::Borrowed(body),
        Some(path) => {
            let sentence = body.trim_end_matches([':', ',', ';', ')']).len();
            Cow::Owned(format!("{path}{}", &body[sentence.max(path.len())..]))
        }
    }
}

/// Masks tokens of the hub and of GitHub, and JSON web tokens. Their fixed first letters identify them.
fn without_tokens(text: &str) -> Option<String> {
    const STARTS: [&str; 6] = ["hf_", "ghp_", "gho_", "ghs_", "github_pat_", "eyJ"];
    const LETTERS_MIN: usize = 20;
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.');
    let (start, at) =
        STARTS.iter().filter_map(|start| Some((start, text.find(start)?))).min_by_key(|(_, at)| *at)?;
    let behind = &text[at + start.len()..];
    let length = behind.find(|letter| !is_part(letter)).unwrap_or(behind.len());
    (length >= LETTERS_MIN).then(|| format!("{}{start}***{}", &text[..at], &behind[length..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lose_user_and_query_however_they_are_mistyped() {
        for (written, shown) in [
            ("https://user:PW@host/x?sig=S", "https://host/x"),
            ("https://PW@host/x?S", "https://host/x"),
            ("https//user:PW@host/x?sig=S: no file matches", "https//host/x: no file matches"),
            ("\"http:/user:PW@host/x?sig=S\"", "\"http:/host/x\""),
            ("https:user:PW@host/x", "https:host/x"),
            ("user:PW@host/x?sig=S", "host/x"),
            ("user:P/W@W@host/x", "host/x"),
            ("host/x?sig=S&b=1, then", "host/x, then"),
            ("model=https://user:PW@host/m#PW", "model=https://host/m"),
            ("(https://host/x?sig=S)", "(https://host/x)"),
            ("https://host/x?config=S", "https://host/x"),
            ("hf://datasets/o/n?config=en&token=S", "hf://datasets/o/n"),
            ("https://host/x#limit=5&key=S", "https://host/x"),
            ("token hf_abcdefghijklmnopqrstuvwxyz0123 in it", "token hf_*** in it"),
            ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjIn0.c2ln", "eyJ***"),
        ] {
            assert_eq!(without_secrets(written), shown, "{written}");
        }
    }

    #[test]
    fn a_known_secret_is_masked_wherever_it_stands() {
        for secret in ["canary-of-clean", "canary-of-clean-and-more", " short\n", ""] {
            never_show(secret);
        }
        assert_eq!(
            clean("bad password xcanary-of-cleanx, canary-of-clean-and-more: short", 99),
            "bad password x***x, ***: short"
        );
    }

    #[test]
    fn what_holds_no_secret_stays_as_it_is() {
        for text in [
            "host:5000/team/a@sha256:ab12 is pushed",
            "hf://owner/name@main and hf://gpt2@main",
            "/data/a?.parquet, ./part-??.parquet",
            "https://host/x#sha256=ab",
            "https://host/x#layout=text&limit=5, and more",
            "choose one: hf://datasets/owner/name?config=en&split=train",
            "hf://datasets/owner/name@main?split=test#weight=2",
            "is that so? yes=1",
            "somebody@example.org",
            "job.yaml:3:5: learning_rate",
            "hf_transfer",
            "größe @ 数据",
        ] {
            assert_eq!(without_secrets(text), text);
        }
    }

    #[test]
    fn nothing_moves_the_cursor() {
        assert_eq!(clean("a\u{1b}[2Jb\r\nc\u{9b}d", 99), "a\\u{1b}[2Jb\\r\\nc\\u{9b}d");
        assert_eq!(clean("file\u{202e}gpj.exe", 99), "file\\u{202e}gpj.exe");
        assert_eq!(clean("größe 数据 ok", 99), "größe 数据 ok");
        assert_eq!(clean("abcdef", 3), "abc…");
    }
}

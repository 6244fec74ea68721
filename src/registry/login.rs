//! Credential + the registry's challenge -> what the client sends. Tried before any transfer, so that a wrong password
//! is told with the registry's own words, and a busy token server is not taken for a wrong password.

use std::time::{Duration, SystemTime};

use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use reqwest::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use serde::Deserialize;
use url::Url;

use super::credentials::Login;
use super::trouble::{Nature, Trouble};

/// The name under which a registry takes a refresh token as a password (Azure's convention, honoured by others).
const TOKEN_USER: &str = "00000000-0000-0000-0000-000000000000";
/// LIMIT: of an answer about logging in.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// LIMIT: of a wait that a registry asks for.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// `base` is `scheme://host`.
pub(super) async fn log_in(
    http: &reqwest::Client,
    base: &str,
    reference: &Reference,
    login: &Login,
    push: bool,
) -> Result<RegistryAuth, Trouble> {
    let probe = format!("{base}/v2/");
    let answer = http.get(&probe).send().await?;
    match challenge(&answer) {
        Challenge::None => Ok(plain(login)),
        Challenge::Basic => {
            if let RegistryAuth::Basic(username, password) = plain(login) {
                expect_success(http.get(&probe).basic_auth(username, Some(password)).send().await?).await?;
            }
            Ok(plain(login))
        }
        Challenge::Bearer { realm, service } => {
            let url = token_url(base, &realm, service.as_deref(), reference, push)?;
            match login {
                Login::Anonymous => {
                    expect_success(http.get(url).send().await?).await.map(|_| RegistryAuth::Anonymous)
                }
                Login::Password { username, password } => {
                    expect_success(http.get(url).basic_auth(username, Some(password)).send().await?).await?;
                    Ok(plain(login))
                }
                Login::IdentityToken(token) => exchange(http, url, token, login).await,
            }
        }
    }
}

/// Without an exchange. The client asks for Bearer tokens itself, and again when they expire.
fn plain(login: &Login) -> RegistryAuth {
    match login {
        Login::Anonymous => RegistryAuth::Anonymous,
        Login::Password { username, password } => RegistryAuth::Basic(username.clone(), password.clone()),
        Login::IdentityToken(token) => RegistryAuth::Basic(TOKEN_USER.into(), token.clone()),
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// OAuth2: a refresh token for an access token. Servers that only know `GET` take it as a password.
async fn exchange(
    http: &reqwest::Client,
    mut url: Url,
    token: &str,
    login: &Login,
) -> Result<RegistryAuth, Trouble> {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs([("grant_type", "refresh_token"), ("client_id", "hone"), ("refresh_token", token)]);
    form.extend_pairs(url.query_pairs());
    let body = form.finish();
    let get = url.clone();
    url.set_query(None);
    let request = http.post(url).header("Content-Type", "application/x-www-form-urlencoded").body(body);
    let answer = request.send().await?;
    if matches!(answer.status().as_u16(), 404 | 405) {
        expect_success(http.get(get).basic_auth(TOKEN_USER, Some(token)).send().await?).await?;
        return Ok(plain(login));
    }
    let text = expect_success(answer).await?;
    let answer: Option<TokenAnswer> = serde_json::from_str(&text).ok();
    match answer.and_then(|answer| answer.access_token.or(answer.token)) {
        Some(token) => Ok(RegistryAuth::Bearer(token)),
        None => Err(Trouble::unauthorized("the token server's answer holds no token")),
    }
}

fn token_url(
    base: &str,
    realm: &str,
    service: Option<&str>,
    reference: &Reference,
    push: bool,
) -> Result<Url, Trouble> {
    let mut url = Url::parse(realm)
        .map_err(|_| Trouble::unauthorized(format!("the registry names no valid token server: {realm}")))?;
    if base.starts_with("https:") && url.scheme() != "https" {
        return Err(Trouble::unauthorized(
            "the registry sends its password on to a token server without TLS",
        ));
    }
    let actions = if push { "pull,push" } else { "pull" };
    let mut query = url.query_pairs_mut();
    query.append_pair("scope", &format!("repository:{}:{actions}", reference.repository()));
    if let Some(service) = service {
        query.append_pair("service", service);
    }
    drop(query);
    Ok(url)
}

/// The body of a good answer; any other becomes Trouble with the registry's words and its Retry-After.
async fn expect_success(mut answer: reqwest::Response) -> Result<String, Trouble> {
    let status = answer.status();
    let wait = answer.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES_MAX {
            return Err(Trouble::rejected("the answer to the login exceeds 1 MiB"));
        }
    }
    let text = String::from_utf8_lossy(&body).into_owned();
    match status.is_success() {
        true => Ok(text),
        false => {
            let trouble = Trouble::answer(status.as_u16(), &text);
            // Token servers answer 400 to a refresh token that was revoked.
            let nature = if status.as_u16() == 400 { Nature::Unauthorized } else { trouble.nature };
            Err(Trouble { wait, nature, ..trouble })
        }
    }
}

/// Seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    let wait = match text.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(WAIT_MAX))
}

#[derive(Debug, PartialEq)]
enum Challenge {
    None,
    Basic,
    Bearer { realm: String, service: Option<String> },
}

fn challenge(answer: &reqwest::Response) -> Challenge {
    let values = answer.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let all: Vec<Challenge> = values.map(read_challenge).collect();
    let has_bearer = |challenge: &Challenge| matches!(challenge, Challenge::Bearer { .. });
    let basic = all.contains(&Challenge::Basic);
    all.into_iter().find(has_bearer).unwrap_or(if basic { Challenge::Basic } else { Challenge::None })
}

/// One header: `Bearer realm="https://...",service="..."`, or any other scheme with a password.
fn read_challenge(text: &str) -> Challenge {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text, ""));
    let (mut realm, mut service) = (None, None);
    while let Some((name, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        match name.trim_matches([',', ' ']).to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value.to_string()),
            "service" => service = Some(value.to_string()),
            _ => {}
        }
        rest = next;
    }
    match (scheme.to_ascii_lowercase().as_str(), realm) {
        ("bearer", Some(realm)) => Challenge::Bearer { realm, service },
        ("bearer", None) => Challenge::None,
        _ => Challenge::Basic,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_whatever_their_order_and_quoting() {
        let bearer = |realm: &str, service: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(str::to_string),
        };
        for (text, expected) in [
            (
                r#"Bearer realm="https://a/t",service="s, x",scope="repository:a:pull,push""#,
                bearer("https://a/t", Some("s, x")),
            ),
            (r#"bearer service=s, realm="https://a/t?x=1""#, bearer("https://a/t?x=1", Some("s"))),
            (r#"Bearer realm="https://a/t"#, bearer("https://a/t", None)),
            (r#"Basic realm="test""#, Challenge::Basic),
            ("Basic", Challenge::Basic),
            ("Bearer", Challenge::None),
        ] {
            assert_eq!(read_challenge(text), expected, "{text}");
        }
    }

    #[test]
    fn waits_are_bounded() {
        assert_eq!(retry_after("3"), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("1000000000"), Some(WAIT_MAX));
        assert_eq!(retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn a_password_does_not_leave_tls() {
        let reference = Reference::try_from("reg.io/a").unwrap();
        assert!(token_url("https://reg.io", "http://reg.io/t", None, &reference, true).is_err());
        assert!(token_url("http://reg.io", "http://reg.io/t", None, &reference, true).is_ok());
        let url = token_url("https://reg.io", "https://t.io/?x=1", Some("s"), &reference, false).unwrap();
        assert_eq!(url.query(), Some("x=1&scope=repository%3Aa%3Apull&service=s"));
    }
}

//! The user's text -> a `Source`. Nothing that could be a secret is ever printed.

use std::fmt;

use url::Url;

use super::options::Source;
use super::{address, scheme};
use crate::fault::{Fault, Result};

/// `fetch` handles `oci://` before a source is parsed.
const SUPPORTED: &str = "supported are http://, https://, hf://datasets/, s3://, gs://, az://, oci://, file://, and paths of files, folders and \
     globs";
const DIGEST_HELP: &str = "write `#sha256=` and 64 hexadecimal digits";

impl Source {
    /// Parses `http(s)://...`, `file:///...`, an object store's address or a path, each with an optional
    /// `#sha256=<64 hex>`.
    ///
    /// # Errors
    /// Config: another scheme, an invalid URL or digest, a link-local address.
    pub fn parse(text: &str) -> Result<Source> {
        let text = text.trim();
        if text.is_empty() || text.contains('\0') {
            return Err(Fault::config("a source is empty or contains a zero byte").help(SUPPORTED));
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            Some("http" | "https") => parse_url(text),
            Some("file") => parse_file_url(text),
            Some(store) if scheme::is_known(store) => parse_object(text),
            Some(other) if is_scheme(other) => {
                Err(Fault::config(format!("a source has the scheme `{other}://`, which is not supported"))
                    .help(SUPPORTED))
            }
            _ => parse_path(text),
        }
    }

    /// Returns the source as the user named it, without user, password, query and fragment.
    pub fn name(&self) -> String {
        match self {
            Source::Url { url, .. } => bare(url).to_string(),
            Source::Path { pattern, .. } => pattern.clone(),
        }
    }
}

/// Prints no secret, so that a whole plan may be logged with `{:?}`.
impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Source::Url { sha256, .. } | Source::Path { sha256, .. }) = self;
        f.debug_struct("Source").field("name", &self.name()).field("sha256", sha256).finish()
    }
}

/// Returns whether `text` is a SHA-256 in lower-case hex. Nothing else may become a file name of the cache.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn parse_url(text: &str) -> Result<Source> {
    let mut url = Url::parse(text)
        .map_err(|error| Fault::config(format!("{}: not a valid URL: {error}", without_secrets(text))))?;
    let name = bare(&url);
    let sha256 = url.fragment().map(|fragment| digest(fragment, name.as_str())).transpose()?;
    url.set_fragment(None);
    if address::forbidden_host(&url) {
        return Err(Fault::config(format!("{name}: link-local addresses are refused"))
            .help("clouds serve machine credentials there; give the address of the file server"));
    }
    Ok(Source::Url { url, sha256 })
}

/// Parses `SCHEME://BUCKET/KEY`. A key with wildcards or a `/` at its end names several objects. `?` is a wildcard
/// and begins no query.
fn parse_object(text: &str) -> Result<Source> {
    let (address, sha256) = match text.split_once("#sha256=") {
        Some((address, _)) => (address, Some(digest(&text[address.len() + 1..], address)?)),
        None => (text, None),
    };
    let escaped = address.replace('?', "%3F").replace('#', "%23");
    let url = Url::parse(&escaped).map_err(|error| {
        Fault::config(format!("{}: not a valid address: {error}", without_secrets(address)))
    })?;
    let has_bucket = url.host_str().is_some_and(|bucket| !bucket.is_empty());
    if !has_bucket || !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
        let shown = without_secrets(address);
        return Err(Fault::config(format!("{shown}: expected {}://BUCKET/NAME", url.scheme()))
            .help("credentials and the endpoint belong in the environment, not in the address"));
    }
    Ok(Source::Url { url, sha256 })
}

fn parse_file_url(text: &str) -> Result<Source> {
    let url = Url::parse(text)
        .map_err(|error| Fault::config(format!("{}: not a valid URL: {error}", without_secrets(text))))?;
    let name = bare(&url);
    let sha256 = url.fragment().map(|fragment| digest(fragment, name.as_str())).transpose()?;
    let path = url.to_file_path().map_err(|()| {
        Fault::config(format!("{name}: a file URL must name a file on this machine"))
            .help("write file:///absolute/path, with three slashes")
    })?;
    let pattern = path
        .into_os_string()
        .into_string()
        .map_err(|_| Fault::config(format!("{name}: the path is not valid UTF-8")))?;
    Ok(Source::Path { pattern, sha256 })
}

/// Parses a path. `#` is an ordinary character of it; only `#sha256=` ends it.
fn parse_path(text: &str) -> Result<Source> {
    let Some((pattern, _)) = text.split_once("#sha256=") else {
        return Ok(Source::Path { pattern: text.to_owned(), sha256: None });
    };
    let sha256 = digest(&text[pattern.len() + 1..], pattern)?;
    Ok(Source::Path { pattern: pattern.to_owned(), sha256: Some(sha256) })
}

fn digest(fragment: &str, name: &str) -> Result<String> {
    let Some(hex) = fragment.strip_prefix("sha256=") else {
        return Err(Fault::config(format!(
            "{name}: the text after `#` is no digest, and no layout, weight, limit or name of a dataset"
        ))
        .help(DIGEST_HELP));
    };
    let hex = hex.to_ascii_lowercase();
    if !is_sha256(&hex) {
        let found = hex.chars().count();
        return Err(Fault::config(format!(
            "{name}: `#sha256=` is followed by {found} characters, expected 64 hexadecimal digits"
        ))
        .help(DIGEST_HELP));
    }
    Ok(hex)
}

fn bare(url: &Url) -> Url {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Both calls fail only on URLs that cannot have a user, and these have none.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// Returns the scheme of a text that is not a URL, and its part between user and query.
fn without_secrets(text: &str) -> String {
    let end = text.find(['?', '#']).unwrap_or(text.len());
    match text[..end].split_once("://") {
        Some((scheme, rest)) => {
            format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
        }
        None => text[..end].to_owned(),
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|char| char.is_ascii_alphanumeric() || matches!(char, '+' | '-' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    const HEX: &str = "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855";

    fn refused(text: &str) -> String {
        let fault = Source::parse(text).expect_err("must be refused");
        assert_eq!(fault.kind, Kind::Config, "{fault}");
        fault.to_string()
    }

    #[test]
    fn a_url_gives_up_its_digest_and_keeps_its_query() {
        let source =
            Source::parse(&format!("https://u:p@Host:8443/a%20b.parquet?sig=x#sha256={HEX}")).unwrap();
        let Source::Url { url, sha256 } = &source else { panic!("{source:?}") };
        assert_eq!(url.as_str(), "https://u:p@host:8443/a%20b.parquet?sig=x");
        assert_eq!(sha256.as_deref(), Some(HEX.to_ascii_lowercase().as_str()));
        assert_eq!(source.name(), "https://host:8443/a%20b.parquet");
    }

    #[test]
    fn paths_stay_as_written() {
        for text in ["a.parquet", "/data/**/*.parquet", "with#hash", "odd:name", "./a?.parquet"] {
            assert_eq!(
                Source::parse(text).unwrap(),
                Source::Path { pattern: text.into(), sha256: None },
                "{text}"
            );
        }
        let pinned = Source::parse(&format!("a.parquet#sha256={HEX}")).unwrap();
        assert_eq!(
            pinned,
            Source::Path { pattern: "a.parquet".into(), sha256: Some(HEX.to_ascii_lowercase()) }
        );
    }

    #[test]
    fn a_file_url_becomes_its_decoded_path() {
        let source = Source::parse("file:///mnt/a%20b.parquet").unwrap();
        assert_eq!(source, Source::Path { pattern: "/mnt/a b.parquet".into(), sha256: None });
        assert!(refused("file://elsewhere/a.parquet").contains("three slashes"));
    }

    #[test]
    fn other_schemes_name_the_supported_ones() {
        let message = refused("ftp://key:canary@bucket/a?canary");
        assert!(message.contains("`ftp://`") && message.contains("https://"), "{message}");
        assert!(!message.contains("canary"), "{message}");
        refused("");
    }

    #[test]
    fn invalid_urls_and_digests_are_told_without_secrets() {
        for text in [
            "http://user:canary@host:99999/a?canary",
            "http://user:canary@host/a?canary#canary",
            "http://user:canary@host/a?canary#sha256=12",
            "http://user:canary@169.254.169.254/latest?canary",
        ] {
            let message = refused(text);
            assert!(!message.contains("canary"), "{message}");
        }
    }

    #[test]
    fn link_local_addresses_are_refused_in_every_spelling() {
        for host in ["169.254.169.254", "2852039166", "0xa9fea9fe", "[::ffff:169.254.169.254]", "[fe80::1]"] {
            assert!(refused(&format!("http://{host}/")).contains("link-local"), "{host}");
        }
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let source = Source::parse("https://user:canary@host/a?canary=canary").unwrap();
        assert!(!format!("{source:?}").contains("canary"));
    }
}

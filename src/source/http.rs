//! One GET request: URL, validators and range -> a body worth reading, or the reason why there is none.

use std::time::{Duration, SystemTime};

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Response, StatusCode, redirect};
use serde::{Deserialize, Serialize};
use url::Url;

use super::failure::Failure;
use super::hub::Hub;
use super::options::Options;
use super::redirect::redirects;
use super::statement::Statement;
use super::{address, describe, tls};
use crate::fault::{Fault, Result};

/// The headers that identify one version of a file on its server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Validators {
    /// The ETag.
    pub etag: Option<String>,
    /// The date of the last change.
    pub last_modified: Option<String>,
    /// Whether the file was at least a second old when it was served, so that no second version can have the same
    /// date.
    pub last_modified_is_strong: bool,
}

/// One request for a file.
pub struct Ask<'a> {
    /// The URL.
    pub url: &'a Url,
    /// The URL without secrets, for messages.
    pub name: &'a str,
    /// Bytes of the file that are already here.
    pub have: u64,
    /// The version that these bytes belong to.
    pub version: &'a Validators,
    /// The length of that version, if known.
    pub total: Option<u64>,
    /// The hub, if the URL has its origin.
    pub hub: Option<&'a Hub>,
    /// For an object of a store: the signed URL, its headers with range and conditions, and the store's help.
    pub signed: Option<(Url, HeaderMap, &'static str)>,
    /// The version of the cached file, to learn whether it is still the newest.
    pub cached: Option<&'a Validators>,
}

/// A file, or a part of it, that is about to arrive.
pub struct Body {
    /// The response whose body follows.
    pub response: Response,
    /// Offset of the first byte: 0, or the one asked for.
    pub start: u64,
    /// Length of the whole file, if the server gave it.
    pub total: Option<u64>,
    /// The version on the server.
    pub validators: Validators,
    /// The digest of the whole file, if the server states one.
    pub statement: Option<Statement>,
    /// Whether the server declares it as a web page.
    pub is_html: bool,
}

/// The result of an attempt.
pub type Attempted<T> = std::result::Result<T, Failure>;

impl Validators {
    fn of(headers: &HeaderMap) -> Validators {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let date = |name| text(name).and_then(|text| httpdate::parse_http_date(&text).ok());
        let age = match (date(header::DATE), date(header::LAST_MODIFIED)) {
            (Some(date), Some(modified)) => date.duration_since(modified).unwrap_or_default(),
            _ => Duration::ZERO,
        };
        Validators {
            etag: text(header::ETAG),
            last_modified: text(header::LAST_MODIFIED),
            last_modified_is_strong: age >= Duration::from_secs(1),
        }
    }

    /// Returns the value for `If-Range`: a strong ETag, or else a date that cannot belong to two versions (RFC 9110,
    /// 13.1.5).
    pub fn for_range(&self) -> Option<&str> {
        let etag = self.etag.as_deref().filter(|etag| etag.starts_with('"'));
        etag.or(self.last_modified.as_deref().filter(|_| self.last_modified_is_strong))
    }

    /// Returns whether the server gave no validator.
    pub fn is_empty(&self) -> bool {
        self.etag.is_none() && self.last_modified.is_none()
    }

    /// Returns whether both name a version and the versions differ.
    fn contradicts(&self, other: &Validators) -> bool {
        let differ = |a: &Option<String>, b: &Option<String>| matches!((a, b), (Some(a), Some(b)) if a != b);
        differ(&self.etag, &other.etag) || differ(&self.last_modified, &other.last_modified)
    }
}

/// Makes a client with the timeouts, trusted authorities and redirect rules of downloads.
pub fn client(options: &Options) -> Result<reqwest::Client> {
    client_with(options, redirects())
}

/// Makes the same client for signed requests. It follows no redirect, because a signature holds for one address
/// only.
pub fn direct_client(options: &Options) -> Result<reqwest::Client> {
    client_with(options, redirect::Policy::none())
}

fn client_with(options: &Options, redirects: redirect::Policy) -> Result<reqwest::Client> {
    tls::client_builder(options.ca_file.as_deref())?
        .user_agent(concat!("hone/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        .read_timeout(options.read_timeout)
        .redirect(redirects)
        // A signed URL must not reach the next host as Referer.
        .referer(false)
        .dns_resolver(address::Resolver)
        .build()
        .map_err(|error| Fault::config(format!("cannot set up HTTPS: {}", describe::innermost(&error))))
}

/// Makes one request. `None`: the cached file is the newest.
pub async fn get(client: &reqwest::Client, ask: &Ask<'_>, options: &Options) -> Attempted<Option<Body>> {
    let resume = ask.version.for_range().filter(|_| ask.have > 0);
    let mut headers = HeaderMap::new();
    // Compression would hide the length and shift every range.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut set = |name, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    if let Some(validator) = resume {
        set(header::RANGE, &format!("bytes={}-", ask.have));
        set(header::IF_RANGE, validator);
    }
    match ask.cached {
        Some(Validators { etag: Some(etag), .. }) => set(header::IF_NONE_MATCH, etag),
        Some(Validators { last_modified: Some(date), .. }) => set(header::IF_MODIFIED_SINCE, date),
        _ => (),
    }
    if let Some(value) = ask.hub.and_then(|hub| hub.authorization(ask.url)) {
        headers.insert(header::AUTHORIZATION, value.clone());
    }
    let url = match &ask.signed {
        Some((url, signed, _)) => {
            // A signature may cover the range and the conditions, so the store's own headers replace those above.
            headers = signed.clone();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            url
        }
        None => ask.url,
    };
    if address::forbidden_host(url) {
        return Err(Fault::config(format!("{}: {}, which hone refuses", ask.name, address::Forbidden)).into());
    }
    let resume = resume.filter(|_| ask.signed.is_none() || headers.contains_key(header::RANGE));
    // The client's timeouts restart with each byte, so one header per second could go on for hours.
    let patience = options.connect_timeout + 2 * options.read_timeout;
    let sent = tokio::time::timeout(patience, client.get(url.clone()).headers(headers).send()).await;
    let Ok(sent) = sent else {
        return Err(Failure::retry(format!("no complete response header within {patience:?}")));
    };
    let response = sent.map_err(|error| describe::failure(&error, ask.name, options))?;
    judge(response, ask, resume.is_some())
}

fn judge(response: Response, ask: &Ask, resuming: bool) -> Attempted<Option<Body>> {
    let status = response.status();
    if status == StatusCode::NOT_MODIFIED && ask.cached.is_some() {
        return Ok(None);
    }
    if status == StatusCode::PRECONDITION_FAILED && resuming {
        return Err(Failure::from_start("the file changed on the server"));
    }
    if status == StatusCode::RANGE_NOT_SATISFIABLE && resuming {
        return Err(Failure::from_start("the server no longer has the requested range"));
    }
    if status != StatusCode::OK && status != StatusCode::PARTIAL_CONTENT {
        return Err(refusal(&response, ask, resuming));
    }
    identity(response.headers(), ask.name)?;
    let validators = Validators::of(response.headers());
    let length = response.content_length();
    let (start, total) = match status {
        StatusCode::OK => (0, length),
        _ if !resuming => {
            return Err(Fault::data(format!(
                "{}: the server sent a part of the file, but all of it was requested",
                ask.name
            ))
            .into());
        }
        _ if ask.version.contradicts(&validators) => {
            return Err(Failure::from_start("the file changed on the server"));
        }
        _ => match range(response.headers(), ask, length) {
            Some(total) => (ask.have, total),
            None => return Err(Failure::from_start("the server sent another range than the requested one")),
        },
    };
    let statement = Statement::of(response.headers(), status == StatusCode::OK);
    let is_html =
        text(response.headers(), header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html"));
    Ok(Some(Body { response, start, total, validators, statement, is_html }))
}

/// Returns the file's length as given by a 206 response (`*`: unknown), if the part is the one asked for and of the
/// same file.
fn range(headers: &HeaderMap, ask: &Ask, length: Option<u64>) -> Option<Option<u64>> {
    let (first, last, total) = content_range(text(headers, header::CONTENT_RANGE)?)?;
    let same_start = first == ask.have;
    let same_length = length.is_none_or(|length| length == last - first + 1);
    let same_total = ask.total.is_none() || total.is_none() || ask.total == total;
    (same_start && same_length && same_total).then_some(total.or(ask.total))
}

/// Parses `bytes 5-9/10` or `bytes 5-9/*`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    // The length is one more than the difference.
    let ordered = first <= last && last < u64::MAX;
    (ordered && total.is_none_or(|total| last < total)).then_some((first, last, total))
}

fn identity(headers: &HeaderMap, name: &str) -> Result<()> {
    match text(headers, header::CONTENT_ENCODING) {
        None | Some("" | "identity") => Ok(()),
        Some(encoding) => Err(Fault::data(format!(
            "{name}: sent with Content-Encoding `{}` although none was requested, so length and digest cannot be checked",
            describe::printable(encoding)
        ))
        .help("switch compression off for this file on the server or its proxy")),
    }
}

fn refusal(response: &Response, ask: &Ask, resuming: bool) -> Failure {
    let (status, name) = (response.status(), ask.name);
    match status.as_u16() {
        404 | 410 => Fault::data(format!("{name}: the server has no such file (HTTP {})", status.as_u16()))
            .help("check the URL; some servers answer 404 if a login is missing")
            .into(),
        401 | 403 => {
            let help = match (ask.hub, resuming || ask.url.query().is_some()) {
                _ if ask.signed.is_some() => ask.signed.as_ref().map_or("", |(_, _, help)| help),
                (Some(hub), _) => hub.help(),
                (None, true) => {
                    "the URL may have been signed for a limited time and have expired; sign a new one"
                }
                (None, false) => "the server requires credentials; give a signed URL, or one that needs none",
            };
            Fault::auth(format!("{name}: access refused (HTTP {})", status.as_u16())).help(help).into()
        }
        301 | 307 | 400 if ask.signed.is_some() => {
            let region = response.headers().get("x-amz-bucket-region").and_then(|value| value.to_str().ok());
            let told = format!("{name}: the object store answered HTTP {}", status.as_u16());
            match region {
                Some(region) => {
                    Fault::config(format!("{told}: the bucket is in region {}", describe::printable(region)))
                        .help("set AWS_REGION to that region")
                }
                None => Fault::config(told).help(ask.signed.as_ref().map_or("", |(_, _, help)| help)),
            }
            .into()
        }
        407 => Fault::config(format!("{name}: the proxy requires credentials (HTTP 407)"))
            .help("put them into HTTPS_PROXY or HTTP_PROXY")
            .into(),
        408 | 425 | 429 | 500..=599 => Failure::Retry {
            cause: format!("the server answered HTTP {status}"),
            after: text(response.headers(), header::RETRY_AFTER)
                .and_then(|value| retry_after(value, SystemTime::now())),
            from_start: false,
        },
        _ => Fault::data(format!("{name}: the server answered HTTP {status}, expected 200"))
            .help("open the address in a browser; it may be wrong, or need a login")
            .into(),
    }
}

/// Parses seconds or an HTTP date. Anything else is ignored.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default()),
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, 0, None)));
        for wrong in [
            "",
            "bytes */10",
            "5-9/10",
            "bytes 9-5/10",
            "bytes 5-10/10",
            "bytes 5-/10",
            "bytes 0-18446744073709551615/*",
            "bytes -1-2/3",
            "items 0-1/2",
        ] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn validators_are_absent_or_not() {
        assert!(Validators::default().is_empty());
        assert!(!Validators { etag: Some("\"a\"".into()), ..Validators::default() }.is_empty());
        assert!(!Validators { last_modified: Some("today".into()), ..Validators::default() }.is_empty());
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let seconds = |value| retry_after(value, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(seconds("1000000000"), Some(1_000_000_000));
        assert_eq!(seconds("soon"), None);
        assert_eq!(seconds("-1"), None);
    }

    #[test]
    fn only_strong_validators_guard_a_range() {
        let of = |headers: &[(&'static str, &str)]| {
            let map = headers
                .iter()
                .map(|(name, value)| (header::HeaderName::from_static(name), value.parse().unwrap()))
                .collect();
            Validators::of(&map).for_range().map(str::to_owned)
        };
        let modified = ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(of(&[("etag", "\"a\""), modified]).as_deref(), Some("\"a\""));
        assert_eq!(of(&[("etag", "W/\"a\"")]), None);
        assert_eq!(of(&[modified]), None, "of unknown age");
        assert_eq!(of(&[modified, ("date", modified.1)]), None, "may change within this second");
        let later = ("date", "Sun, 06 Nov 1994 08:49:38 GMT");
        assert_eq!(of(&[modified, later]).as_deref(), Some(modified.1));
    }
}

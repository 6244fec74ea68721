//! Credential + the registry's challenge -> the authorization of later requests. The login is tried before any
//! transfer. So a wrong password is reported in the registry's own words, and a busy token server is not mistaken for
//! a wrong password.

use std::time::{Duration, Instant, SystemTime};

use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use reqwest::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use serde::Deserialize;
use url::Url;

use super::credentials::Login;
use super::trouble::{Nature, Trouble};
use crate::source;

/// The name under which a registry takes a refresh token as a password (Azure's convention, honoured by others).
const TOKEN_USER: &str = "00000000-0000-0000-0000-000000000000";
/// LIMIT: size of an answer about logging in.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// LIMIT: longest wait that a registry may ask for.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// Lifetime of a token if its server does not say, and the shortest lifetime that there may be (the token
/// specification).
const LIFETIME_MIN: Duration = Duration::from_secs(60);
/// A token is renewed this long before it expires, since clocks differ and requests take time.
const LIFETIME_MARGIN: Duration = Duration::from_secs(10);

/// The authorization that the registry accepts now.
pub(super) struct Session {
    /// The authorization of requests.
    pub auth: RegistryAuth,
    renew_at: Option<Instant>,
}

impl Session {
    pub(super) fn is_fresh(&self) -> bool {
        self.renew_at.is_none_or(|renew_at| Instant::now() < renew_at)
    }
}

impl From<RegistryAuth> for Session {
    fn from(auth: RegistryAuth) -> Session {
        Session { auth, renew_at: None }
    }
}

/// Logs in. `base` is `scheme://host/v2/`.
pub(super) async fn log_in(
    http: &reqwest::Client,
    base: &Url,
    reference: &Reference,
    login: &Login,
    push: bool,
) -> Result<Session, Trouble> {
    let answer = http.get(base.clone()).send().await?;
    // A registry that fails has not said whether it wants a login.
    if matches!(answer.status().as_u16(), 408 | 425 | 429 | 500..=599) {
        return Err(successful(answer).await.expect_err("the status says that it failed"));
    }
    match challenge(&answer) {
        Challenge::None => Ok(RegistryAuth::Anonymous.into()),
        Challenge::Basic => {
            if let RegistryAuth::Basic(username, password) = plain(login) {
                let probe = http.get(base.clone()).basic_auth(username, Some(password));
                successful(probe.send().await?).await?;
            }
            Ok(plain(login).into())
        }
        Challenge::Bearer { realm, service } => {
            let secret = !matches!(login, Login::Anonymous);
            let url = token_url(realm_url(base, &realm, secret)?, service.as_deref(), reference, push);
            match login {
                Login::Anonymous => session(http.get(url).send().await?).await,
                Login::Password { username, password } => {
                    session(http.get(url).basic_auth(username, Some(password)).send().await?).await
                }
                Login::IdentityToken(token) => exchange(http, url, token).await,
            }
        }
    }
}

/// Returns the login without a token exchange.
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
    /// Seconds.
    expires_in: Option<u64>,
}

/// Exchanges a refresh token for an access token (OAuth2). Servers that only support `GET` take it as a password.
async fn exchange(http: &reqwest::Client, mut url: Url, token: &str) -> Result<Session, Trouble> {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs([("grant_type", "refresh_token"), ("client_id", "hone"), ("refresh_token", token)]);
    form.extend_pairs(url.query_pairs());
    let body = form.finish();
    let get = url.clone();
    url.set_query(None);
    let request = http.post(url).header("Content-Type", "application/x-www-form-urlencoded").body(body);
    let answer = request.send().await?;
    if matches!(answer.status().as_u16(), 404 | 405) {
        return session(http.get(get).basic_auth(TOKEN_USER, Some(token)).send().await?).await;
    }
    session(answer).await
}

/// Returns the session of a token server's answer.
async fn session(answer: reqwest::Response) -> Result<Session, Trouble> {
    let answered = Instant::now();
    let answer = successful(answer).await.map_err(|trouble| match trouble.status {
        // Servers answer 400 if a refresh token was revoked.
        Some(400) => Trouble { nature: Nature::Unauthorized, ..trouble },
        _ => trouble,
    })?;
    let answer: Option<TokenAnswer> =
        serde_json::from_slice(&read_up_to(answer, ANSWER_BYTES_MAX).await?).ok();
    let useful = useful_for(answer.as_ref().and_then(|answer| answer.expires_in));
    match answer.and_then(|answer| answer.access_token.or(answer.token)) {
        Some(token) => Ok(Session {
            auth: RegistryAuth::Bearer(token),
            // `None`: the time is beyond the clock's range.
            renew_at: answered.checked_add(useful),
        }),
        None => Err(Trouble::unauthorized("the token server's answer holds no token")),
    }
}

/// Returns the time that a token is used, from the lifetime in seconds that a token server states.
fn useful_for(expires_in: Option<u64>) -> Duration {
    expires_in.map_or(LIFETIME_MIN, Duration::from_secs).max(LIFETIME_MIN) - LIFETIME_MARGIN
}

/// Returns the address of the token server that a registry names. If there is a credential (`secret`), it is sent to
/// this server: over TLS, or, if the registry itself is used without TLS, only on the registry's own host. Metadata
/// services are never asked.
pub(super) fn realm_url(base: &Url, realm: &str, secret: bool) -> Result<Url, Trouble> {
    let url = Url::parse(realm).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let url = url
        .ok_or_else(|| Trouble::unauthorized(format!("the registry names no valid token server: {realm}")))?;
    if source::forbidden_host(&url) {
        return Err(Trouble::unauthorized(
            "the registry names a link-local address as its token server, which is refused",
        ));
    }
    let to_another_host = secret && url.host() != base.host();
    if url.scheme() != "https" && (base.scheme() == "https" || to_another_host) {
        return Err(Trouble::unauthorized(
            "the registry names a token server without TLS, which would get the password",
        ));
    }
    Ok(url)
}

fn token_url(mut url: Url, service: Option<&str>, reference: &Reference, push: bool) -> Url {
    let actions = if push { "pull,push" } else { "pull" };
    let mut query = url.query_pairs_mut();
    query.append_pair("scope", &format!("repository:{}:{actions}", reference.repository()));
    if let Some(service) = service {
        query.append_pair("service", service);
    }
    drop(query);
    url
}

/// Passes a successful answer; any other becomes a Trouble with the registry's words and its Retry-After.
pub(super) async fn successful(answer: reqwest::Response) -> Result<reqwest::Response, Trouble> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let wait = answer.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    // The status counts, even if the words cannot be read.
    let words = read_up_to(answer, ANSWER_BYTES_MAX).await.unwrap_or_default();
    Err(Trouble { wait, ..Trouble::answer(status.as_u16(), &String::from_utf8_lossy(&words)) })
}

pub(super) async fn read_up_to(mut answer: reqwest::Response, bytes_max: u64) -> Result<Vec<u8>, Trouble> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        body.extend_from_slice(&chunk);
        if body.len() as u64 > bytes_max {
            return Err(Trouble::rejected(format!("the answer exceeds {bytes_max} bytes")));
        }
    }
    Ok(body)
}

/// Returns the wait of a Retry-After header, which holds seconds or a date.
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

/// Reads one header: `Bearer realm="https://...",service="..."`, or any other scheme with a password.
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
    fn tokens_are_renewed_before_they_end() {
        let lasts = |expires_in| useful_for(expires_in).as_secs();
        assert_eq!([lasts(None), lasts(Some(0)), lasts(Some(300))], [50, 50, 290]);
        let ended = Session { auth: RegistryAuth::Anonymous, renew_at: Some(Instant::now()) };
        assert!(!ended.is_fresh() && Session::from(RegistryAuth::Anonymous).is_fresh());
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
        let base = |scheme| Url::parse(&format!("{scheme}://reg.io/v2/")).unwrap();
        let realm = |scheme, realm: &str, secret| realm_url(&base(scheme), realm, secret).is_ok();
        assert!(!realm("https", "http://reg.io/t", true) && !realm("https", "http://reg.io/t", false));
        assert!(realm("http", "http://reg.io/t", true) && realm("http", "http://reg.io:81/t", true));
        assert!(!realm("http", "http://t.io/t", true), "to another host without TLS");
        assert!(realm("http", "http://t.io/t", false) && realm("http", "https://t.io/t", true));
        assert!(!realm("http", "file:///t", false) && !realm("http", "http://169.254.169.254/t", false));
        let url = realm_url(&base("https"), "https://t.io/?x=1", true).unwrap();
        let url = token_url(url, Some("s"), &reference, false);
        assert_eq!(url.query(), Some("x=1&scope=repository%3Aa%3Apull&service=s"));
    }
}

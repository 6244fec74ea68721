//! Requests to one repository of a registry (OCI distribution specification) -> its blobs and manifests.
//!
//! Credentials go only to the registry's own origin. No request changes from https to http.

use std::cell::RefCell;
use std::ops::Range;

use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode};
use url::Url;

use super::credentials::Login;
use super::image::digest_of;
use super::login::{Session, log_in, read_up_to, successful};
use super::manifest::{MANIFEST_BYTES_MAX, MANIFEST_TYPE};
use super::options::Options;
use super::trouble::Trouble;
use crate::fault::{Fault, Result};
use crate::source;

type Attempted<T> = std::result::Result<T, Trouble>;

const USER_AGENT: &str = concat!("hone/", env!("CARGO_PKG_VERSION"));
const BYTES_TYPE: &str = "application/octet-stream";

/// Sends requests to a registry. It logs in on request, and again by itself when a token is about to expire.
pub(super) struct Client {
    /// The client for short requests. It fails if the registry sends nothing for the read time-out.
    quick: reqwest::Client,
    /// The client for uploads, without a read time-out: reqwest's would also run while a body is sent.
    patient: reqwest::Client,
    /// `scheme://host/v2/`
    base: Url,
    reference: Reference,
    login: Login,
    push: bool,
    session: RefCell<Option<Session>>,
}

impl Client {
    /// Returns a client that is not logged in yet. `push`: whether to ask for the right to push.
    ///
    /// Config: the certificates or the host are unusable.
    pub(super) fn new(reference: &Reference, login: &Login, push: bool, options: &Options) -> Result<Client> {
        let scheme = if options.plain_http { "http" } else { "https" };
        let host = reference.resolve_registry();
        let base = Url::parse(&format!("{scheme}://{host}/v2/"))
            .map_err(|error| Fault::config(format!("registry `{host}`: {error}")))?;
        if source::forbidden_host(&base) {
            return Err(Fault::config(format!("registry `{host}`: link-local addresses are refused"))
                .help("clouds keep machine credentials there; give the address of the registry"));
        }
        let builder = || -> Result<reqwest::ClientBuilder> {
            Ok(source::client_builder(options.ca_file.as_deref())?
                .user_agent(USER_AGENT)
                .connect_timeout(options.connect_timeout)
                .redirect(source::redirects())
                .dns_resolver(source::Resolver)
                // A signed address must not be sent to the next host.
                .referer(false))
        };
        let unusable = |error| Fault::config(format!("cannot set up HTTPS: {error}"));
        Ok(Client {
            quick: builder()?.read_timeout(options.read_timeout).build().map_err(unusable)?,
            patient: builder()?.build().map_err(unusable)?,
            base,
            reference: reference.clone(),
            login: login.clone(),
            push,
            session: RefCell::new(None),
        })
    }

    /// Logs in, unless there is a login that is still valid.
    pub(super) async fn log_in(&self) -> Attempted<()> {
        if self.session.borrow().as_ref().is_some_and(Session::is_fresh) {
            return Ok(());
        }
        self.log_out();
        let session = log_in(&self.quick, &self.base, &self.reference, &self.login, self.push).await?;
        self.session.replace(Some(session));
        Ok(())
    }

    pub(super) fn log_out(&self) {
        self.session.replace(None);
    }

    pub(super) fn is_logged_in(&self) -> bool {
        self.session.borrow().is_some()
    }

    /// Returns the texts that must never appear in a message. They include the token, and the header made of a
    /// password, in case a registry quotes it.
    pub(super) fn secrets(&self) -> Vec<String> {
        let mut secrets = self.login.secrets();
        if let Login::Password { username, password } = &self.login {
            let request = self.quick.get(self.base.clone()).basic_auth(username, Some(password)).build().ok();
            let header = request.and_then(|request| request.headers().get(AUTHORIZATION).cloned());
            let encoded = header.as_ref().and_then(|header| header.to_str().ok()?.split_once(' '));
            secrets.extend(encoded.map(|(_, encoded)| encoded.to_string()));
        }
        if let Some(Session { auth: RegistryAuth::Bearer(token), .. }) = &*self.session.borrow() {
            secrets.push(token.clone());
        }
        secrets
    }

    /// Returns whether the registry has the blob. A refusal counts as no: the upload will get the reason, which an
    /// answer to HEAD cannot hold.
    pub(super) async fn has_blob(&self, digest: &str) -> Attempted<bool> {
        let url = self.url("blobs", digest)?;
        match self.ask(&self.quick, Method::HEAD, url, |request| request).await {
            Ok(_) => Ok(true),
            Err(trouble) if trouble.status.is_some() => Ok(false),
            Err(trouble) => Err(trouble),
        }
    }

    /// Requests a blob by its digest alone, although a descriptor may name other servers too. The caller verifies the
    /// bytes. The body begins at byte `start` if the registry supports ranges (206), or else at the first byte.
    pub(super) async fn blob(&self, digest: &str, start: u64) -> Attempted<Response> {
        let dress = |request: RequestBuilder| match start {
            0 => request,
            _ => request.header(RANGE, format!("bytes={start}-")),
        };
        self.ask(&self.quick, Method::GET, self.url("blobs", digest)?, dress).await
    }

    /// Begins an upload and returns the address for the blob.
    pub(super) async fn begin_upload(&self) -> Attempted<Url> {
        let url = self.url("blobs", "uploads/")?;
        // Some registries insist on a length.
        let answer =
            self.ask(&self.quick, Method::POST, url, |request| request.header(CONTENT_LENGTH, 0)).await?;
        self.location(&answer)
    }

    /// Sends one chunk. Returns the address for the next one, and the last byte that the registry says it has, if it
    /// says so.
    pub(super) async fn send_chunk(
        &self,
        location: Url,
        bytes: Range<u64>,
        body: Body,
    ) -> Attempted<(Url, Option<u64>)> {
        let answer = self
            .ask(&self.patient, Method::PATCH, location, |request| {
                request
                    .header(CONTENT_TYPE, BYTES_TYPE)
                    .header(CONTENT_LENGTH, bytes.end - bytes.start)
                    .header(CONTENT_RANGE, format!("{}-{}", bytes.start, bytes.end - 1))
                    .body(body)
            })
            .await?;
        let range = answer.headers().get(RANGE).and_then(|value| value.to_str().ok());
        Ok((self.location(&answer)?, range.and_then(last_byte)))
    }

    /// Ends an upload with its last `bytes`, which may be the whole blob or nothing.
    pub(super) async fn finish_upload(
        &self,
        mut location: Url,
        digest: &str,
        bytes: u64,
        body: Body,
    ) -> Attempted<()> {
        location.query_pairs_mut().append_pair("digest", digest);
        let answer = self
            .ask(&self.patient, Method::PUT, location, |request| {
                let request = request.header(CONTENT_LENGTH, bytes);
                if bytes > 0 { request.header(CONTENT_TYPE, BYTES_TYPE).body(body) } else { request }
            })
            .await?;
        match answer.status() {
            StatusCode::CREATED => Ok(()),
            other => Err(Trouble::violation(format!("an upload ends with {other}, not 201"))),
        }
    }

    /// Requests a manifest. `reference` is a tag or a digest; the caller verifies a digest.
    pub(super) async fn manifest(&self, reference: &str, accepted: &[&str]) -> Attempted<Vec<u8>> {
        let url = self.url("manifests", reference)?;
        let answer = self
            .ask(&self.quick, Method::GET, url, |request| request.header(ACCEPT, accepted.join(", ")))
            .await?;
        let told = answer.headers().get("Docker-Content-Digest").and_then(|value| value.to_str().ok());
        let told = told.filter(|told| told.starts_with("sha256:")).map(str::to_string);
        let bytes = read_up_to(answer, MANIFEST_BYTES_MAX).await?;
        match told {
            Some(told) if told != digest_of(&bytes) => Err(Trouble::transient(format!(
                "the registry says that the manifest has the digest {told}, but it has another"
            ))),
            _ => Ok(bytes),
        }
    }

    /// Writes a manifest. Any success status is accepted, because the caller reads the manifest back.
    pub(super) async fn put_manifest(&self, tag: &str, bytes: Vec<u8>) -> Attempted<()> {
        let url = self.url("manifests", tag)?;
        let dress = |request: RequestBuilder| request.header(CONTENT_TYPE, MANIFEST_TYPE).body(bytes);
        self.ask(&self.quick, Method::PUT, url, dress).await.map(drop)
    }

    fn url(&self, kind: &str, name: &str) -> Attempted<Url> {
        let path = format!("{}/{kind}/{name}", self.reference.repository());
        self.base.join(&path).map_err(|error| Trouble::rejected(format!("{path}: {error}")))
    }

    /// Sends a request. Returns a successful answer, or a Trouble with the registry's words.
    async fn ask(
        &self,
        http: &reqwest::Client,
        method: Method,
        url: Url,
        dress: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Attempted<Response> {
        let own = url.origin() == self.base.origin();
        let mut request = dress(http.request(method, url));
        if own {
            self.log_in().await?;
            request = match self.session.borrow().as_ref().map(|session| &session.auth) {
                Some(RegistryAuth::Basic(username, password)) => request.basic_auth(username, Some(password)),
                Some(RegistryAuth::Bearer(token)) => request.bearer_auth(token),
                Some(RegistryAuth::Anonymous) | None => request,
            };
        }
        successful(request.send().await?).await
    }

    /// Returns the address of an answer's `Location`, relative or absolute. It may belong to a storage provider.
    fn location(&self, answer: &Response) -> Attempted<Url> {
        let text = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let text = text.ok_or_else(|| Trouble::violation("the answer has no Location"))?;
        next_url(answer.url(), text)
    }
}

fn next_url(asked: &Url, location: &str) -> Attempted<Url> {
    let url = asked.join(location).map_err(|_| Trouble::violation("the answer's Location is no address"))?;
    if source::forbidden_host(&url) {
        return Err(Trouble::rejected("it wants the upload sent to a link-local address, which is refused"));
    }
    match (asked.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => Ok(url),
        _ => Err(Trouble::rejected(
            "it wants the upload sent without TLS (is X-Forwarded-Proto missing at a proxy before it?)",
        )),
    }
}

/// Returns the last byte in `0-1023`; some registries write `bytes=0-1023`.
fn last_byte(range: &str) -> Option<u64> {
    range.rsplit_once('-')?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_relative_or_absolute_and_never_leave_tls() {
        let asked = Url::parse("https://reg.io:443/v2/a/blobs/uploads/").unwrap();
        for (location, expected) in [
            ("/v2/a/blobs/uploads/1?state=x", "https://reg.io/v2/a/blobs/uploads/1?state=x"),
            ("1", "https://reg.io/v2/a/blobs/uploads/1"),
            ("https://reg.io/v2/up/1", "https://reg.io/v2/up/1"),
            ("https://storage.io/x?signature=y", "https://storage.io/x?signature=y"),
        ] {
            assert_eq!(next_url(&asked, location).unwrap().as_str(), expected);
        }
        assert!(next_url(&asked, "http://reg.io/v2/up/1").is_err());
        assert!(next_url(&asked, "file:///etc/passwd").is_err());
        for host in ["169.254.169.254", "[fd00:ec2::23]", "100.100.100.200", "metadata.google.internal"] {
            assert!(next_url(&asked, &format!("https://{host}/up")).is_err(), "{host}");
            let realm = format!("https://{host}/token");
            assert!(super::super::login::realm_url(&asked, &realm, false).is_err(), "{host}");
        }
        let plain = Url::parse("http://reg.io/v2/").unwrap();
        assert!(
            next_url(&plain, "http://reg.io/up").is_ok() && next_url(&plain, "https://reg.io/up").is_ok()
        );
    }

    #[test]
    fn ranges_are_read_with_and_without_unit() {
        assert_eq!(last_byte("0-1023"), Some(1023));
        assert_eq!(last_byte("bytes=0-7"), Some(7));
        assert_eq!(last_byte("none"), None);
    }
}

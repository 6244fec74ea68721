//! Web pages of other origins -> whether they may ask this server: the headers of CORS.
//!
//! A browser lets a page read an answer only if the answer names the page's origin, and asks with OPTIONS before it
//! sends JSON or a key. It sends simple requests without asking, so that requests that change what is served
//! are refused if they come from such a page.
//!
//! Source: the Fetch standard, 3.2 (CORS protocol); Sec-Fetch-Site as Go's `http.CrossOriginProtection` reads it.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HOST, HeaderMap, HeaderValue, ORIGIN, VARY,
};
use hyper::{Method, Request, Response, StatusCode};

use super::error::{Error, Result};
use super::reply::Reply;

/// Every origin.
const ANY: &str = "*";
/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";

/// Returns whether an origin is written as browsers send it, or is `*`.
pub fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return text == ANY || text == "null" };
    let plain =
        |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_graphic() && !"/?#@*".contains(c));
    plain(scheme) && plain(host)
}

/// The origins whose pages may ask.
pub struct Origins(Vec<String>);

impl Origins {
    /// These origins; `*` stands for all of them.
    pub fn new(allowed: &[String]) -> Origins {
        Origins(allowed.iter().map(|origin| origin.to_ascii_lowercase()).collect())
    }

    fn any(&self) -> bool {
        self.0.iter().any(|allowed| allowed == ANY)
    }

    /// The origin of the asking page, if it may ask.
    fn allowed<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        let origin = headers.get(ORIGIN)?;
        let text = origin.to_str().ok()?;
        (self.any() || self.0.iter().any(|allowed| allowed.eq_ignore_ascii_case(text))).then_some(origin)
    }

    /// The headers that let a page of another origin read the answer; none if it may not.
    pub fn headers(&self, asked: &HeaderMap) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !self.0.is_empty() && !self.any() {
            headers.insert(VARY, HeaderValue::from_static("origin"));
        }
        if let Some(origin) = self.allowed(asked) {
            let shown = if self.any() { HeaderValue::from_static(ANY) } else { origin.clone() };
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, shown);
            let exposed = HeaderValue::from_static("retry-after, x-ignored-fields");
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
        headers
    }

    /// The answer to a browser that asks what a page may send; `None`: the request is no such question, or the page
    /// may send nothing.
    pub fn preflight<B>(&self, request: &Request<B>) -> Option<Response<Reply>> {
        let asked = request.headers();
        let question =
            request.method() == Method::OPTIONS && asked.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        self.allowed(asked).filter(|_| question)?;
        let mut response = Response::new(Reply::Whole(Full::new(Bytes::new())));
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST, DELETE"));
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
        // `*` would not stand for Authorization.
        if let Some(wanted) = asked.get(ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        Some(response)
    }

    /// Refuses a change of what is served that a page of another origin asks for. Programs send none of these headers.
    pub fn may_change<B>(&self, request: &Request<B>) -> Result<()> {
        let headers = request.headers();
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let foreign = match (text("sec-fetch-site"), headers.get(ORIGIN)) {
            (Some(site), _) => !matches!(site, "same-origin" | "none"),
            (None, Some(origin)) => {
                let host = origin.to_str().ok().and_then(|origin| Some(origin.split_once("://")?.1));
                host.is_none() || host != text(HOST.as_str())
            }
            (None, None) => false,
        };
        match foreign && self.allowed(headers).is_none() {
            true => Err(Error::new(
                StatusCode::FORBIDDEN,
                "A web page of another origin may not change adapters and mixes; \
                 start the server with --allowed-origins and its origin if it may",
            )),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_scheme_a_host_and_perhaps_a_port() {
        for text in [
            "*",
            "null",
            "https://chat.example.com",
            "http://localhost:3000",
            "tauri://localhost",
            "http://[::1]:80",
        ] {
            assert!(is_origin(text), "{text}");
        }
        for text in [
            "",
            "chat.example.com",
            "https://",
            "://x",
            "https://a.example/",
            "https://*.example.com",
            "http://a b",
        ] {
            assert!(!is_origin(text), "{text}");
        }
    }

    /// Programs, the server's own page, and pages that are allowed may change what is served; other pages may not.
    #[test]
    fn pages_of_other_origins_change_nothing() {
        let may = |allowed: &[&str], headers: &[(&str, &str)]| {
            let allowed: Vec<String> = allowed.iter().map(|origin| origin.to_string()).collect();
            let asked = headers
                .iter()
                .fold(Request::post("/v1/mixes"), |asked, (name, value)| asked.header(*name, *value));
            Origins::new(&allowed).may_change(&asked.body(()).unwrap()).is_ok()
        };
        let (host, page) = (("host", "127.0.0.1:8000"), ("origin", "https://evil.example"));
        assert!(may(&[], &[host]));
        assert!(may(&[], &[host, ("origin", "http://127.0.0.1:8000")]));
        assert!(may(&[], &[host, ("sec-fetch-site", "none")]));
        // A proxy may give the host another name; the browser knows.
        assert!(may(
            &[],
            &[("host", "inner"), ("origin", "https://chat.example"), ("sec-fetch-site", "same-origin")]
        ));
        assert!(!may(&[], &[host, page]));
        assert!(!may(&[], &[host, ("origin", "null")]));
        assert!(!may(&[], &[host, ("origin", "http://127.0.0.1:3000"), ("sec-fetch-site", "same-site")]));
        assert!(!may(&["https://good.example"], &[host, page]));
        assert!(may(&["https://Evil.example"], &[host, page, ("sec-fetch-site", "cross-site")]));
        assert!(may(&["*"], &[host, page]));
    }
}

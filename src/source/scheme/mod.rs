//! Addresses of object stores -> signed requests for objects, and lists of objects. A scheme is one file here and
//! one line in `SCHEMES`.
//!
//! The crate `object_store` handles credentials and signatures. It builds the request for an object as usual, but the
//! request is caught and sent by `http`, so that attempts, resuming, verification and the cache are the same as for
//! every other download. Its own requests (lists, tokens) use a separate client. Only there may an address be
//! link-local, because clouds answer there for the identity of a pod or machine. No address that a user writes as a
//! source ever reaches that client.

mod az;
mod gs;
mod s3;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::TryStreamExt;
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpService,
};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, PutMultipartOptions, PutOptions, RetryConfig};
use reqwest::header::HeaderMap;
use url::Url;

use super::http::Validators;
use super::options::Options;
use super::{address, describe, tls};
use crate::backoff;
use crate::fault::{Fault, Kind, Result};
use crate::report::{Report, Stage};

const SCHEMES: [&Scheme; 3] = [&s3::SCHEME, &gs::SCHEME, &az::SCHEME];
/// LIMIT: bytes of one page of a list, or of a token.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Bytes of a part of a large object; stores want at least 5 MiB.
const PART_BYTES: usize = 16 << 20;
/// LIMIT: objects below one address.
const OBJECTS_MAX: usize = 100_000;

/// One kind of object store.
pub(super) struct Scheme {
    /// The scheme of its addresses: `s3` in `s3://BUCKET/KEY`.
    pub name: &'static str,
    /// Help for refused access.
    pub help: &'static str,
    /// Opens the store of a bucket with the settings of the environment.
    open: fn(bucket: &str, Caught) -> object_store::Result<Arc<dyn ObjectStore>>,
}

/// Returns the scheme of an address, if it is an object store's.
pub(super) fn of(url: &Url) -> Option<&'static Scheme> {
    SCHEMES.into_iter().find(|scheme| scheme.name == url.scheme())
}

/// Returns whether `NAME://` is the scheme of an object store.
pub(super) fn is_known(name: &str) -> bool {
    SCHEMES.iter().any(|scheme| scheme.name == name)
}

/// An entry of a list of objects.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// The object's address.
    pub url: Url,
    /// The object's key below the address that was listed.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Identifies the version, if the store has versions.
    pub etag: Option<String>,
}

/// The stores of one `fetch`. Each is opened once, so that its token serves all objects.
pub(super) struct Stores {
    client: reqwest::Client,
    open: RefCell<HashMap<String, Arc<dyn ObjectStore>>>,
}

impl Stores {
    /// Makes the client for lists and tokens. No store is opened yet.
    pub fn new(options: &Options) -> Result<Stores> {
        let client = tls::client_builder(options.ca_file.as_deref())?
            .user_agent(concat!("hone/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.read_timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| {
                Fault::config(format!("cannot set up HTTPS: {}", describe::innermost(&error)))
            })?;
        Ok(Stores { client, open: RefCell::default() })
    }

    /// Returns the signed URL of an object and the headers to send: for all of it, or for the missing part of a
    /// version.
    ///
    /// # Errors
    /// Auth: no credentials. Config: unusable settings in the environment.
    pub async fn request(
        &self,
        url: &Url,
        have: u64,
        version: &Validators,
        cached: Option<&Validators>,
    ) -> Result<(Url, HeaderMap)> {
        let caught = Catch::default();
        let resumed = version.etag.clone().filter(|_| have > 0 && version.for_range().is_some());
        let mut options = GetOptions {
            range: resumed.is_some().then_some(GetRange::Offset(have)),
            if_match: resumed,
            if_none_match: cached.and_then(|validators| validators.etag.clone()),
            ..GetOptions::default()
        };
        options.extensions.insert(caught.clone());
        let failed = self.store(url)?.get_opts(&key(url)?, options).await.err();
        let request = caught.0.lock().expect("nobody panics with it").take();
        let Some(request) = request else {
            return Err(match failed {
                Some(error) => refused(url, &error),
                None => Fault::internal("a request passed that should have been caught"),
            });
        };
        let address = Url::parse(&request.uri().to_string())
            .map_err(|error| Fault::config(format!("{url}: its endpoint gives no valid URL: {error}")))?;
        let mut headers = request.headers().clone();
        headers.remove(reqwest::header::HOST);
        headers.remove(reqwest::header::CONTENT_LENGTH);
        Ok((address, headers))
    }

    /// Returns every object below an address, sorted by key.
    pub async fn list(&self, url: &Url) -> Result<Vec<Object>> {
        let prefix = key(url)?;
        let store = self.store(url)?;
        let mut found = store.list(Some(&prefix));
        let mut objects = Vec::new();
        while let Some(object) = found.try_next().await.map_err(|error| refused(url, &error))? {
            let name = object.location.as_ref().strip_prefix(prefix.as_ref()).unwrap_or_default();
            let mut of_object = url.clone();
            of_object.set_path(&format!("/{}", escaped(object.location.as_ref())));
            let name = name.trim_start_matches('/').to_owned();
            objects.push(Object { url: of_object, name, bytes: object.size, etag: object.e_tag });
            if objects.len() > OBJECTS_MAX {
                return Err(Fault::data(format!("{url}: more than {OBJECTS_MAX} objects below it"))
                    .help("give the folder that contains the data files"));
            }
        }
        objects.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(objects)
    }

    /// Writes a file to an object: in one request if it is small, else in parts that become one object at the end.
    /// Returns its version, if the store has versions.
    async fn put(&self, url: &Url, path: &std::path::Path) -> std::result::Result<Option<String>, Refused> {
        let store = self.store(url).map_err(Refused::Ours)?;
        let key = key(url).map_err(Refused::Ours)?;
        let theirs = |error| Refused::Theirs(error);
        let unread = |error: std::io::Error| Refused::Ours(Fault::storage("read", path, &error));
        let mut file = std::fs::File::open(path).map_err(unread)?;
        let mut part = read_part(&mut file).map_err(unread)?;
        if part.len() < PART_BYTES {
            return Ok(store.put_opts(&key, part.into(), PutOptions::default()).await.map_err(theirs)?.e_tag);
        }
        let mut upload =
            store.put_multipart_opts(&key, PutMultipartOptions::default()).await.map_err(theirs)?;
        while !part.is_empty() {
            if let Err(error) = upload.put_part(part.into()).await {
                // The rest costs only space; buckets have rules that remove it.
                let _ = upload.abort().await;
                return Err(Refused::Theirs(error));
            }
            part = read_part(&mut file).map_err(unread)?;
        }
        Ok(upload.complete().await.map_err(theirs)?.e_tag)
    }

    fn store(&self, url: &Url) -> Result<Arc<dyn ObjectStore>> {
        let bucket = url.host_str().unwrap_or_default();
        let name = format!("{}://{bucket}", url.scheme());
        if let Some(store) = self.open.borrow().get(&name) {
            return Ok(store.clone());
        }
        let scheme = of(url).ok_or_else(|| Fault::internal(format!("{name} is no object store")))?;
        check_endpoints(&|name| std::env::var(name).ok())?;
        let store =
            (scheme.open)(bucket, Caught(self.client.clone())).map_err(|error| refused(url, &error))?;
        self.open.borrow_mut().insert(name, store.clone());
        Ok(store)
    }
}

/// Variables that name another server of a store.
const ENDPOINTS: [&str; 6] = [
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
];

/// Refuses a server of a store that is a metadata service.
fn check_endpoints(variable: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    let forbidden = |name: &&&str| {
        let url = variable(name).and_then(|text| Url::parse(text.trim()).ok());
        url.is_some_and(|url| address::forbidden_host(&url))
    };
    match ENDPOINTS.iter().find(forbidden) {
        Some(name) => Err(Fault::config(format!("{name}: {}, which hone refuses", address::Forbidden))),
        None => Ok(()),
    }
}

/// The reason why an object was not written.
enum Refused {
    Ours(Fault),
    Theirs(object_store::Error),
}

fn read_part(file: &mut std::fs::File) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut part = Vec::new();
    file.take(PART_BYTES as u64).read_to_end(&mut part)?;
    Ok(part)
}

/// Writes files below an address, each with some attempts.
pub(super) async fn upload(
    url: &Url,
    files: &[(&str, &std::path::Path)],
    options: &Options,
    report: &Report,
) -> Result<Option<String>> {
    let stores = Stores::new(options)?;
    let mut version = None;
    for (name, path) in files {
        let mut object = url.clone();
        object.set_path(&format!("{}/{name}", url.path().trim_end_matches('/')));
        let mut failures = 0;
        version = loop {
            let error = match stores.put(&object, path).await {
                Ok(version) => break version,
                Err(Refused::Ours(fault)) => return Err(fault),
                Err(Refused::Theirs(error)) => error,
            };
            failures += 1;
            let told = without_queries(&innermost(&error));
            let again = matches!(error, object_store::Error::Generic { .. }) && !told.contains("redential");
            if !again || failures >= options.attempts_max {
                let fault = refused(&object, &error);
                return Err(match fault.kind {
                    Kind::Auth if again => Fault::new(Kind::Push, format!("{object}: {told}")),
                    Kind::Data => Fault::config(fault.message),
                    _ => fault,
                });
            }
            report.note(Stage::Push, format!("{object}: {told}; it is tried again"));
            tokio::time::sleep(backoff::pause(options.backoff, Duration::from_secs(30), failures)).await;
        };
    }
    Ok(version)
}

/// Retries for all stores: few for lists and tokens. Caught requests are not retried here.
fn retries() -> RetryConfig {
    RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(30), ..RetryConfig::default() }
}

fn key(url: &Url) -> Result<Path> {
    Path::from_url_path(url.path())
        .map_err(|error| Fault::config(format!("{url}: not the name of an object: {error}")))
}

/// Returns a key as the path of a URL. Characters that would begin a query or a fragment are escaped.
fn escaped(key: &str) -> String {
    key.replace('%', "%25").replace('?', "%3F").replace('#', "%23")
}

fn refused(url: &Url, error: &object_store::Error) -> Fault {
    use object_store::Error as E;
    let help = of(url).map_or("", |scheme| scheme.help);
    let told = without_queries(&innermost(error));
    match error {
        E::NotFound { .. } => {
            Fault::data(format!("{url}: there is no such bucket or object: {told}")).help(help)
        }
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
            Fault::auth(format!("{url}: access refused: {told}")).help(help)
        }
        _ if told.contains("onnect") || told.contains("timed out") => Fault::network(format!(
            "{url}: no answer to a request for a list of objects or for credentials: {told}"
        ))
        .help(help),
        _ => Fault::auth(format!("{url}: no usable credentials or settings: {told}")).help(help),
    }
}

fn innermost(error: &object_store::Error) -> String {
    let chain = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    chain.last().map(|error| describe::printable(&error.to_string())).unwrap_or_default()
}

/// Removes queries, which may hold signatures.
fn without_queries(text: &str) -> String {
    let cut = |word: &str| match word.contains("://") {
        true => word.split('?').next().unwrap_or_default().to_owned(),
        false => word.to_owned(),
    };
    text.split(' ').map(cut).collect::<Vec<_>>().join(" ")
}

/// A marker in a request's extensions: the request is kept here and not sent.
#[derive(Clone, Default)]
struct Catch(Arc<Mutex<Option<HttpRequest>>>);

/// hone's HTTP client, for requests that are not caught.
#[derive(Clone, Debug)]
struct Caught(reqwest::Client);

impl HttpConnector for Caught {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

type Answered<'a> = Pin<Box<dyn Future<Output = std::result::Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Caught {
    fn call<'a, 'b>(&'a self, request: HttpRequest) -> Answered<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            if let Some(catch) = request.extensions().get::<Catch>().cloned() {
                *catch.0.lock().expect("nobody panics with it") = Some(request);
                return Err(HttpError::new(HttpErrorKind::Unknown, Kept));
            }
            self.send(request).await
        })
    }
}

impl Caught {
    async fn send(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let failed = |error: reqwest::Error| HttpError::new(kind(&error), error.without_url());
        let mut sent = self.0.request(parts.method, parts.uri.to_string()).headers(parts.headers);
        let bytes = match body.as_bytes() {
            Some(bytes) => bytes.clone(),
            None => http_body_util::BodyExt::collect(body).await?.to_bytes(), // the parts of an object
        };
        if !bytes.is_empty() {
            sent = sent.body(bytes);
        }
        let mut response = sent.send().await.map_err(failed)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut content = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            content.extend_from_slice(&chunk);
            if content.len() > ANSWER_BYTES_MAX {
                return Err(HttpError::new(HttpErrorKind::Decode, TooLong));
            }
        }
        let mut answer = HttpResponse::new(content.into());
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        Ok(answer)
    }
}

fn kind(error: &reqwest::Error) -> HttpErrorKind {
    match error {
        error if error.is_timeout() => HttpErrorKind::Timeout,
        error if error.is_connect() => HttpErrorKind::Connect,
        error if error.is_request() => HttpErrorKind::Request,
        _ => HttpErrorKind::Interrupted,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the request is kept, not sent")]
struct Kept;

#[derive(Debug, thiserror::Error)]
#[error("an answer of more than {ANSWER_BYTES_MAX} bytes")]
struct TooLong;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_no_metadata_service() {
        let check = |name: &str, value: &str| {
            check_endpoints(&|other| (other == name).then(|| value.to_owned())).map_err(|fault| fault.kind)
        };
        for name in ENDPOINTS {
            assert_eq!(check(name, "http://169.254.169.254/"), Err(Kind::Config), "{name}");
            assert_eq!(check(name, " http://[fd00:ec2::254]:80"), Err(Kind::Config), "{name}");
            assert_eq!(check(name, "http://127.0.0.1:9000"), Ok(()), "{name}");
        }
        assert_eq!(check("AWS_METADATA_ENDPOINT", "http://169.254.169.254/"), Ok(()));
    }

    #[test]
    fn a_query_is_never_shown() {
        assert_eq!(without_queries("GET https://h/a?sig=secret failed"), "GET https://h/a failed");
    }

    #[test]
    fn keys_stay_what_they_are() {
        let mut url = Url::parse("s3://bucket/a").unwrap();
        for name in ["data/a b.parquet", "data/100%.parquet", "data/what?.parquet", "data/é#1.parquet"] {
            url.set_path(&format!("/{}", escaped(name)));
            assert_eq!(key(&url).unwrap().as_ref(), name, "{url}");
        }
    }
}

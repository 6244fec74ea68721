//! A file server that misbehaves on demand: each connection is one request, and a closure makes the answer.
//!
//! Raw sockets, so that a reply can lie about its length, stop, reset or never end.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Upper bound of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Upper bound of a request's body.
const BODY_BYTES_MAX: usize = 64 << 20;

/// The client's request.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Header names are in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body, if its length was given.
    pub body: Vec<u8>,
}

/// The reply to a request.
#[derive(Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    then: Then,
}

/// The end of the connection after the body.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Close,
    Reset,
    /// Stays open and silent until the client leaves.
    Stall,
    /// Repeats the body until the client leaves.
    Repeat,
}

pub struct Server {
    address: SocketAddr,
    scheme: &'static str,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn body_bytes(&self) -> usize {
        let length = self.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        assert!(length <= BODY_BYTES_MAX, "a body of {length} bytes");
        length
    }

    /// Returns the body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Returns the first byte of `Range: bytes=N-`.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

impl Reply {
    /// Returns a body with its honest length.
    pub fn ok(body: impl Into<Vec<u8>>) -> Reply {
        Reply::status(200).body(body)
    }

    pub fn status(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), body: Vec::new(), then: Then::Close }
            .header("Content-Length", "0")
    }

    pub fn redirect(location: impl Into<String>) -> Reply {
        Reply::status(302).header("Location", location)
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Reply {
        self.body = body.into();
        let length = self.body.len().to_string();
        self.header("Content-Length", length)
    }

    /// Sets a header and replaces one of the same name.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self = self.without(name);
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn without(mut self, name: &str) -> Reply {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self
    }

    /// Promises everything and sends only `bytes` of it.
    pub fn cut(mut self, bytes: usize) -> Reply {
        self.body.truncate(bytes);
        self
    }

    /// Ends with a TCP reset.
    pub fn reset(self) -> Reply {
        Reply { then: Then::Reset, ..self }
    }

    pub fn stall(self) -> Reply {
        Reply { then: Then::Stall, ..self }
    }

    pub fn repeat(self) -> Reply {
        Reply { then: Then::Repeat, ..self }
    }

    /// Returns `content` as a good server sends it: whole, the requested range, or 304.
    pub fn file(request: &Request, content: &[u8], etag: &str) -> Reply {
        if request.header("if-none-match") == Some(etag) {
            return Reply::status(304).without("Content-Length").header("ETag", etag);
        }
        let unchanged = request.header("if-range").is_none_or(|known| known == etag);
        match request.range_start().filter(|_| unchanged) {
            Some(start) if start < content.len() => Reply::status(206)
                .body(&content[start..])
                .header("Content-Range", format!("bytes {start}-{}/{}", content.len() - 1, content.len())),
            Some(_) => Reply::status(416).header("Content-Range", format!("bytes */{}", content.len())),
            None => Reply::ok(content),
        }
        .header("ETag", etag)
    }

    fn head(&self) -> String {
        let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head + "\r\n"
    }
}

impl Server {
    /// Answers each request by `script(index of the request, request)`, over plain HTTP.
    pub fn start(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Server {
        Server::run("http", None, script)
    }

    /// Returns the same over TLS, with the certificate for `localhost` that `authority()` signed.
    pub fn start_tls(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Server {
        Server::run("https", Some(tls_config(include_bytes!("tls/server.pem"))), script)
    }

    /// Does the same with a certificate that is its own authority, as `openssl req -x509` makes them.
    pub fn start_self_signed(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Server {
        Server::run("https", Some(tls_config(include_bytes!("tls/self-signed.pem"))), script)
    }

    /// Does the same with a certificate that expired in 2021.
    pub fn start_expired(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Server {
        Server::run("https", Some(tls_config(include_bytes!("tls/self-signed-expired.pem"))), script)
    }

    /// Serves `files` (path -> content) with ETag, ranges and 404.
    pub fn files(files: BTreeMap<String, Vec<u8>>) -> Server {
        Server::start(move |_, request| {
            let path = request.target.split('?').next().unwrap_or_default();
            match files.get(path) {
                Some(content) => Reply::file(request, content, &format!("\"{}-{path}\"", content.len())),
                None => Reply::status(404),
            }
        })
    }

    /// Returns `http://localhost:port` and the path.
    pub fn url(&self, path: &str) -> String {
        format!("{}://localhost:{}{path}", self.scheme, self.address.port())
    }

    /// Returns every request so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    fn run(
        scheme: &'static str,
        tls: Option<Arc<rustls::ServerConfig>>,
        script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, script) = (requests.clone(), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, script, tls) = (seen.clone(), script.clone(), tls.clone());
                std::thread::spawn(move || {
                    let _client_left = match tls {
                        None => serve(stream, &seen, &*script),
                        Some(config) => {
                            let tls = rustls::ServerConnection::new(config).unwrap();
                            serve_tls(rustls::StreamOwned::new(tls, stream), &seen, &*script)
                        }
                    };
                });
            }
        });
        Server { address, scheme, requests }
    }
}

/// Returns the certificate authority of `start_tls`, a PEM file.
pub fn authority() -> PathBuf {
    certificate("authority")
}

/// Returns a PEM file of `tests/support/tls`.
pub fn certificate(name: &str) -> PathBuf {
    PathBuf::from(format!("{}/tests/support/tls/{name}.pem", env!("CARGO_MANIFEST_DIR")))
}

/// Returns an address that nobody listens on.
pub fn unused_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

type Seen = Mutex<Vec<Request>>;
type Script = dyn Fn(usize, &Request) -> Reply + Send + Sync;

fn serve(mut stream: TcpStream, seen: &Seen, script: &Script) -> std::io::Result<()> {
    // Looks at bytes without taking them, because closing a socket with unread bytes sends a reset.
    let mut buffer = vec![0; HEAD_BYTES_MAX];
    let head = loop {
        let count = stream.peek(&mut buffer)?;
        match end_of_head(&buffer[..count]) {
            Some(end) => break end,
            None if count == 0 => return Ok(()),
            // The first byte of a TLS handshake. Like web servers, this one answers it in plain text.
            None if buffer[0] == 0x16 => return send(&mut stream, &Reply::status(400)),
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    let mut request = parse(&String::from_utf8_lossy(&buffer[..head]));
    if request.body_bytes() > 0 {
        stream.read_exact(&mut buffer[..head])?;
        request.body = vec![0; request.body_bytes()];
        stream.read_exact(&mut request.body)?;
        return send(&mut stream, &answer(request, seen, script));
    }
    let reply = answer(request, seen, script);
    if reply.then != Then::Reset {
        stream.read_exact(&mut buffer[..head])?;
    }
    send(&mut stream, &reply)
}

fn serve_tls(mut stream: impl Read + Write, seen: &Seen, script: &Script) -> std::io::Result<()> {
    let mut head = Vec::new();
    while end_of_head(&head).is_none() {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let mut request = parse(&String::from_utf8_lossy(&head));
    request.body = vec![0; request.body_bytes()];
    stream.read_exact(&mut request.body)?;
    let reply = answer(request, seen, script);
    send(&mut stream, &reply)
}

fn answer(request: Request, seen: &Seen, script: &Script) -> Reply {
    let mut seen = seen.lock().unwrap();
    seen.push(request.clone());
    let index = seen.len() - 1;
    drop(seen);
    script(index, &request)
}

fn send(stream: &mut (impl Read + Write), reply: &Reply) -> std::io::Result<()> {
    stream.write_all(reply.head().as_bytes())?;
    stream.write_all(&reply.body)?;
    stream.flush()?;
    match reply.then {
        Then::Close | Then::Reset => Ok(()),
        Then::Stall => stream.read_to_end(&mut Vec::new()).map(drop),
        Then::Repeat => loop {
            stream.write_all(&reply.body)?;
        },
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|start| start + 4)
}

fn parse(head: &str) -> Request {
    let mut lines = head.lines();
    let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    Request {
        method: first.next().unwrap_or_default(),
        target: first.next().unwrap_or_default(),
        headers: lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: Vec::new(),
    }
}

fn tls_config(certificate: &[u8]) -> Arc<rustls::ServerConfig> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = CertificateDer::from_pem_slice(certificate).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("tls/server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    Arc::new(config)
}

//! HTTP requests -> the answers of one function, from a thread of its own. Runs and controllers serve their metrics
//! and health with it.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, oneshot};

use crate::fault::{Fault, Result};

/// LIMIT: an idle connection takes the place of another; probes and scrapers need only a few.
const CONNECTIONS_MAX: usize = 32;
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
const HEADERS_TIMEOUT: Duration = Duration::from_secs(5);

/// A GET or HEAD request; other methods are refused before the function is called.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The path without its query.
    pub path: &'a str,
    /// The `Accept` header; empty if there is none.
    pub accept: &'a str,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// HTTP status code.
    pub status: u16,
    /// Value of the `Content-Type` header.
    pub content_type: &'static str,
    /// The body, as text.
    pub body: String,
}

/// Content type of Prometheus' text format.
pub const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Reply {
    /// Returns plain text with status 200.
    pub fn text(body: impl Into<String>) -> Reply {
        Reply { status: 200, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    /// Returns JSON with status 200.
    pub fn json(value: &serde_json::Value) -> Reply {
        Reply { status: 200, content_type: "application/json", body: value.to_string() }
    }

    /// Returns the answer for an unknown path.
    pub fn not_found() -> Reply {
        Reply { status: 404, ..Reply::text("not found\n") }
    }
}

/// The function that answers. It must return at once, because one thread serves all requests.
pub type Answer = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Server {
    /// Returns the address that the server listens on. If port 0 was requested, this holds the port that was found.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Starts a server that listens on `address` and answers from a thread of its own.
///
/// Config: hone cannot listen on the address, for instance because the port is taken.
pub fn start(address: SocketAddr, answer: Answer) -> Result<Server> {
    let refused = |error: std::io::Error| {
        Fault::config(format!("cannot listen on {address}: {error}")).help("name a free port of this machine")
    };
    let listener = TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::machine("start the server's runtime", &error))?;
    let (stop, stopped) = oneshot::channel();
    std::thread::Builder::new()
        .name("serve".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, answer) => {}
                    _ = stopped => {}
                }
            });
        })
        .map_err(|error| Fault::machine("start the server's thread", &error))?;
    Ok(Server { address, _stop: stop })
}

async fn accept(listener: TcpListener, answer: Answer) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let Ok((stream, _)) = listener.accept().await else {
            // File descriptors may have run out: wait before the next try.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = respond(&request, &answer);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADERS_TIMEOUT);
            let connection = http.serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

fn respond(request: &Request<Incoming>, answer: &Answer) -> Response<Full<Bytes>> {
    let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let reply = match *request.method() {
        Method::GET | Method::HEAD => answer(&Asked { path: request.uri().path(), accept }),
        _ => Reply { status: 405, ..Reply::text("only GET and HEAD\n") },
    };
    let mut response = Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(reply.content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn ask(server: &Server, request: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_request_gets_the_functions_answer() {
        let answer: Answer = Arc::new(|asked| match asked.path {
            "/a" => Reply::text(format!("accept {}", asked.accept)),
            _ => Reply::not_found(),
        });
        let server = start("127.0.0.1:0".parse().unwrap(), answer).unwrap();
        let good = ask(&server, "GET /a?b=c HTTP/1.1\r\nhost: h\r\naccept: x/y\r\nconnection: close\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200") && good.ends_with("accept x/y"), "{good}");
        for (request, code) in [("GET /b", 404), ("POST /a", 405)] {
            let said = ask(&server, &format!("{request} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"));
            assert!(said.starts_with(&format!("HTTP/1.1 {code}")), "{said}");
        }
        let taken = start(server.address(), Arc::new(|_| Reply::not_found())).unwrap_err();
        assert!(taken.message.contains("cannot listen on 127.0.0.1"), "{taken}");
    }
}

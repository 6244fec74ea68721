//! A small HTTP server: a path and what the caller accepts -> a text. For metrics and health.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

/// LIMIT: of the head of a request; whoever is slower is cut off.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What is answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub content_type: &'static str,
    pub text: String,
}

impl Answer {
    pub const PROMETHEUS: &'static str = "text/plain; version=0.0.4; charset=utf-8";
    pub const JSON: &'static str = "application/json";
    pub const WORDS: &'static str = "text/plain; charset=utf-8";

    pub fn new(status: u16, content_type: &'static str, text: impl Into<String>) -> Answer {
        Answer { status, content_type, text: text.into() }
    }
}

/// The path and the Accept header of a GET -> an answer; `None`: there is nothing.
pub type Handler = Arc<dyn Fn(&str, &str) -> Option<Answer> + Send + Sync>;

/// Takes the address; port 0 is any free one.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers until it is dropped.
pub async fn serve(listener: TcpListener, handler: Handler) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Too many open files, or a caller that went away: others may come.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let handler = handler.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&handler, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn answer(handler: &Handler, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let found = match *request.method() {
        Method::GET | Method::HEAD => handler(request.uri().path(), accept),
        _ => Some(Answer::new(405, Answer::WORDS, "only GET\n")),
    };
    let found = found.unwrap_or_else(|| Answer::new(404, Answer::WORDS, "not found\n"));
    let mut response = Response::new(Full::from(found.text));
    *response.status_mut() = StatusCode::from_u16(found.status).expect("a status of ours");
    let content_type = found.content_type.parse().expect("a type of ours");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

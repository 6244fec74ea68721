//! A listener -> connections, each with its limits: how many, how long a header may take, how long a reader may stall.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;

use super::body::Received;
use super::route::Service;
use super::state::State;
use crate::fault::{Fault, Result};
use crate::source::install_crypto;

/// LIMIT: time for a request's header, and for TLS to begin.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// LIMIT: bytes of a header.
const HEADERS_BYTES_MAX: usize = 64 << 10;
/// LIMIT: time in which a reader must take something.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// LIMIT: time that connections get for their last answer once the server has stopped.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time in which a request that is on its way to a stopped server is still read and refused.
const LAST_REQUEST: Duration = Duration::from_millis(300);

/// Reads a certificate chain and its key.
///
/// # Errors
/// Config: a file cannot be read, holds none, or they do not fit.
pub fn acceptor(chain: &Path, key: &Path) -> Result<TlsAcceptor> {
    install_crypto();
    let wrong = |file: &Path, why: &dyn std::fmt::Display| {
        Fault::config(format!("TLS file {}: {why}", file.display()))
            .help("give the certificate chain and its private key as PEM files")
    };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(chain)
        .and_then(|list| list.collect())
        .map_err(|error| wrong(chain, &error))?;
    if certificates.is_empty() {
        return Err(wrong(chain, &"holds no certificate"));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, &error))?;
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificates, private)
        .map_err(|error| wrong(key, &error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Answers connections, at most so many at once; others wait in the listener's queue. Once the server has stopped,
/// those in the queue get this answer too, and the function returns when the last connection is closed.
pub async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    service: Arc<Service>,
    connections_max: usize,
    state: State,
) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let places = Arc::new(Semaphore::new(connections_max));
    // Every connection holds a sender, so the receiver ends with the last of them.
    let (open, mut all_closed) = mpsc::channel::<Infallible>(1);
    let begin = |stream, place| {
        let (tls, service, state, open) = (tls.clone(), service.clone(), state.clone(), open.clone());
        tokio::spawn(async move {
            connection(stream, tls, service, state).await;
            drop((place, open));
        });
    };
    let next = async || {
        let place = places.clone().acquire_owned().await.expect("never closed");
        (listener.accept().await, place)
    };
    loop {
        tokio::select! {
            biased;
            () = state.stopped() => break,
            (accepted, place) = next() => match accepted {
                Ok((stream, _)) => begin(stream, Some(place)),
                // Out of file descriptors, for one: the next try must not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
    if let Ok(listener) = listener.into_std() {
        while let Ok((stream, _)) = listener.accept() {
            let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            if let Ok(stream) = stream {
                begin(stream, None);
            }
        }
    }
    drop(open);
    let _in_time = tokio::time::timeout(CLOSE_TIMEOUT, all_closed.recv()).await.is_ok();
}

/// Answers the requests of one connection.
async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, service: Arc<Service>, state: State) {
    // Tokens are small and should not wait for each other.
    let _ = stream.set_nodelay(true);
    match tls {
        None => serve(stream, service, state).await,
        Some(tls) => {
            if let Ok(Ok(stream)) = tokio::time::timeout(HEADERS_TIMEOUT, tls.accept(stream)).await {
                serve(stream, service, state).await;
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, service: Arc<Service>, state: State) {
    let phase = state.clone();
    let respond = service_fn(move |request| {
        let (service, phase) = (service.clone(), phase.clone());
        async move {
            let mut response = service.respond(Received::of(request)).await;
            if phase.ends() {
                // The client's next request belongs to another server.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS_TIMEOUT).max_buf_size(HEADERS_BYTES_MAX);
    let mut connection =
        pin!(http.serve_connection(TokioIo::new(Watched { stream, stalled: None }), respond));
    tokio::select! {
        _ended = &mut connection => return,
        () = state.stopped() => {}
    }
    // An answer closes its connection now. One without a request is closed here; hyper would do so at once.
    if tokio::time::timeout(LAST_REQUEST, &mut connection).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ended = connection.await.is_ok();
    }
}

/// A stream whose reader must not stall: it fails once nothing could be written for a while.
struct Watched<S> {
    stream: S,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    fn look<T>(&mut self, task: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let end = || Box::pin(tokio::time::sleep_until(Instant::now() + STALL_TIMEOUT));
        match self.stalled.get_or_insert_with(end).as_mut().poll(task) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(task, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(task, bytes);
        this.look(task, written)
    }

    fn poll_flush(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_flush(task);
        this.look(task, written)
    }

    fn poll_shutdown(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(task)
    }
}

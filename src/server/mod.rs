//! Requests over HTTP -> answers of a model: OpenAI's API, KAITO's `/chat`, probes, metrics and a page to talk to it.

pub mod error;
pub mod model;
mod answer;
mod ask;
mod body;
mod changes;
mod connection;
mod fields;
mod metrics;
mod origins;
mod reply;
mod route;
mod speak;
mod state;
mod tools;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use model::Model;
pub use origins::is_origin;
pub use route::models;

use crate::fault::{Fault, Result};
use route::Service;
use state::State;

/// The rule for an adapter's name: it stands in labels, lists and addresses.
pub(crate) const NAME_RULE: &str = "expected 1 to 128 letters, digits, '.', '_' or '-'";

/// Returns whether an adapter may have this name.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=128).contains(&name.len()) && name.chars().all(fits)
}

/// Options of a server's listener.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// Certificate chain and key in PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Never shown and never logged.
    pub key: Option<String>,
    /// Origins whose web pages may ask; `*` is all of them. The server's own page always may.
    pub origins: Vec<String>,
    /// LIMIT: bytes of a request's body.
    pub body_bytes_max: usize,
    /// LIMIT: connections that are open at once.
    pub connections_max: usize,
}

impl Default for Options {
    /// Returns options for port 8000, reachable from this machine alone.
    fn default() -> Options {
        Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            tls: None,
            key: None,
            origins: Vec::new(),
            body_bytes_max: 16 << 20,
            connections_max: 2048,
        }
    }
}

/// A server; it answers until it is dropped.
pub struct Server {
    address: SocketAddr,
    state: State,
    runtime: Option<tokio::runtime::Runtime>,
    /// The task that takes connections; it ends after the last of them.
    accepting: Option<tokio::task::JoinHandle<()>>,
}

impl Server {
    /// Listens and answers 503 until there is a model.
    ///
    /// # Errors
    /// Config: the address cannot be listened on, or a file of TLS cannot be used.
    pub fn start(options: &Options) -> Result<Server> {
        let address = options.listen;
        let refused = |error: std::io::Error| {
            Fault::config(format!("cannot listen on {address}: {error}"))
                .help("name a free port of this machine")
        };
        let tls = options.tls.as_ref().map(|(chain, key)| connection::acceptor(chain, key)).transpose()?;
        let listener = TcpListener::bind(address).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(8)
            .thread_name("server")
            .enable_all()
            .build()
            .map_err(|error| Fault::machine("start the server's threads", &error))?;
        let state = State::default();
        let service = Arc::new(Service::new(state.clone(), options));
        let accepting = connection::accept(listener, tls, service, options.connections_max, state.clone());
        let accepting = Some(runtime.spawn(accepting));
        Ok(Server { address, state, runtime: Some(runtime), accepting })
    }

    /// Returns the address on which it listens; the port that was found if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests with this model from now on.
    pub fn ready(&self, model: Arc<Model>) {
        self.state.ready(model);
    }

    /// Returns the number of running answers.
    pub fn running(&self) -> usize {
        self.state.running()
    }

    /// Refuses new requests, lets running ones finish for so long, ends the rest with an error, and ends. Requests that
    /// wait in the listener's queue are refused too, so that no client is left without an answer.
    pub fn drain(mut self, grace: Duration) {
        if let (Some(runtime), Some(accepting)) = (self.runtime.take(), self.accepting.take()) {
            runtime.block_on(async {
                self.state.drain(grace).await;
                let _ended = accepting.await.is_ok();
            });
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

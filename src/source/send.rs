//! A request with a body of any size -> its answer, tried again while that can help. For uploads by synchronous code.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::header::{ETAG, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Body, Method, redirect};
use tokio::runtime::Runtime;
use url::Url;

use super::options::Options;
use super::{address, describe, tls};
use crate::backoff;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage, Task};

/// LIMIT: answers of the hub are some kilobytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Bytes that are read and sent at once.
const PIECE_BYTES: u64 = 128 << 10;
/// A body that is sent more slowly counts as stalled.
const BYTES_PER_SECOND_MIN: u64 = 50_000;
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The interval at which a pause looks for a signal.
const LOOK: Duration = Duration::from_millis(50);
/// LIMIT: the longest wait that a server may ask for.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// Sends requests, follows no redirect, and has a runtime of its own.
pub struct Sender {
    runtime: Option<Runtime>,
    client: Option<reqwest::Client>,
    attempts_max: u32,
    first_pause: Duration,
    timeout: Duration,
}

impl Drop for Sender {
    /// Drops the runtime without waiting for a name that is being looked up.
    fn drop(&mut self) {
        self.client = None;
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// The content that is sent.
pub struct Sending<'a> {
    /// `GET`, `POST` or `PUT`.
    pub method: Method,
    /// The address that it is sent to.
    pub url: &'a Url,
    /// The place in messages, without a query.
    pub name: &'a str,
    /// Headers; secrets among them are marked as sensitive.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body.
    pub body: Content<'a>,
}

/// The body of a request.
#[derive(Clone)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A range of a file, read as it is sent; a task counts it.
    Part {
        /// The file.
        file: &'a Path,
        /// Offset of the first byte.
        from: u64,
        /// Length.
        bytes: u64,
        /// Counts what was sent.
        task: Arc<Task>,
    },
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The header ETag.
    pub etag: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// Returns whether the request succeeded.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Returns the status and the server's own words, for messages.
    pub fn told(&self) -> String {
        let text = describe::printable(&String::from_utf8_lossy(&self.body));
        let text: String = text.trim().chars().take(400).collect();
        if text.is_empty() {
            format!("HTTP {}", self.status)
        } else {
            format!("HTTP {}: {text}", self.status)
        }
    }
}

/// The reason why an attempt gave no answer that counts, and how long the server asks to wait.
type Attempted = std::result::Result<Answer, (String, Option<Duration>)>;

impl Sender {
    /// # Errors
    /// Config: the certificates cannot be used. Internal: no runtime can be started.
    pub fn new(options: &Options) -> Result<Sender> {
        let client = tls::client_builder(options.ca_file.as_deref())?
            .user_agent(concat!("hone/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            // A token must not reach another host.
            .redirect(redirect::Policy::none())
            .referer(false)
            .dns_resolver(address::Resolver)
            .build()
            .map_err(|error| {
                Fault::config(format!("cannot set up HTTPS: {}", describe::innermost(&error)))
            })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Fault::machine("start the runtime for uploads", &error))?;
        let (attempts_max, first_pause) = (options.attempts_max, options.backoff);
        let (runtime, client, timeout) = (Some(runtime), Some(client), options.read_timeout);
        Ok(Sender { runtime, client, attempts_max, first_pause, timeout })
    }

    /// Returns the first answer that another attempt would not change. A refusal is an answer too; the caller knows its
    /// meaning.
    ///
    /// # Errors
    /// Push: there was no answer in `attempts_max` attempts. Interrupted: a signal came; only the push is left.
    /// Config: the address is one that no request may go to.
    pub fn send(&self, sending: &Sending, report: &Report) -> Result<Answer> {
        if address::forbidden_host(sending.url) {
            return Err(Fault::config(format!(
                "{}: {}, which hone refuses",
                sending.name,
                address::Forbidden
            )));
        }
        let mut failures = 0;
        loop {
            if interrupt::requested() {
                return Err(stopped());
            }
            let (why, wait) = match self.attempt(sending) {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            failures += 1;
            if failures >= self.attempts_max {
                return Err(Fault::new(
                    Kind::Push,
                    format!("{}: no success in {failures} attempts: {why}", sending.name),
                )
                .help("the adapter is safe in its folder; start again with the same output folder, or `hone push` it"));
            }
            let pause = backoff::pause(self.first_pause, PAUSE_MAX, failures);
            let pause = wait.map_or(pause, |wait| wait.min(WAIT_MAX));
            let text =
                format!("{}: {why}; the next attempt is in {:.1} s", sending.name, pause.as_secs_f64());
            report.note(Stage::Push, text);
            let until = Instant::now() + pause;
            while Instant::now() < until && !interrupt::requested() {
                std::thread::sleep(LOOK.min(pause));
            }
        }
    }

    fn attempt(&self, sending: &Sending) -> Attempted {
        let client = self.client.as_ref().expect("there until it is dropped");
        let mut request = client.request(sending.method.clone(), sending.url.clone());
        for (name, value) in &sending.headers {
            request = request.header(name, value);
        }
        let (body, bytes) = body(&sending.body).map_err(|error| (error.to_string(), None))?;
        let limit = self.timeout + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN);
        let request = request.header(reqwest::header::CONTENT_LENGTH, bytes).body(body);
        let failed = |error: reqwest::Error| {
            (describe::printable(&describe::innermost(&error.without_url()).to_string()), None)
        };
        let work = async {
            let mut answer = request.send().await.map_err(failed)?;
            let status = answer.status().as_u16();
            let text = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
            let etag = text(ETAG).map(str::to_owned);
            let wait = text(RETRY_AFTER).and_then(|text| text.parse().ok()).map(Duration::from_secs);
            let mut body = Vec::new();
            while let Some(part) = answer.chunk().await.map_err(failed)? {
                body.extend_from_slice(&part);
                if body.len() > ANSWER_BYTES_MAX {
                    return Err((format!("the answer has more than {ANSWER_BYTES_MAX} bytes"), None));
                }
            }
            let answer = Answer { status, etag, body };
            let again = matches!(status, 408 | 425 | 429) || (status >= 500 && status != 501);
            if again { Err((answer.told(), wait)) } else { Ok(answer) }
        };
        let limited = async {
            let limited = tokio::time::timeout(limit, work).await;
            Ok(limited.unwrap_or_else(|_| Err((format!("no answer within {} s", limit.as_secs()), None))))
        };
        let runtime = self.runtime.as_ref().expect("there until it is dropped");
        let ended = runtime.block_on(interrupt::or_stopped(limited, stopped));
        ended.unwrap_or_else(|fault: Fault| Err((fault.message, None)))
    }
}

/// Returns the fault of a signal during a push.
fn stopped() -> Fault {
    Fault::new(Kind::Interrupted, "stopped by a signal while pushing; the adapter is in its folder")
        .help("start it again: only the push is left")
}

/// Returns a body and its length.
fn body(content: &Content) -> std::io::Result<(Body, u64)> {
    match content {
        Content::Bytes(bytes) => Ok((bytes.clone().into(), bytes.len() as u64)),
        Content::Part { file, from, bytes, task } => {
            let (file, end, task) = (File::open(file)?, from + bytes, task.clone());
            let mut at = *from;
            let pieces = std::iter::from_fn(move || {
                let count = PIECE_BYTES.min(end - at);
                if count == 0 {
                    return None;
                }
                let mut piece = vec![0; count as usize];
                let read = file.read_exact_at(&mut piece, at).map(|()| piece);
                // After an error nothing follows.
                at = if read.is_ok() { at + count } else { end };
                task.advance(count);
                Some(read)
            });
            Ok((Body::wrap_stream(futures_util::stream::iter(pieces)), *bytes))
        }
    }
}

//! A small request to a service of the user's -> its answer, for synchronous code: trackers, gateways. There is one
//! attempt, with a time limit; the caller decides what a failure means.

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, redirect};
use tokio::runtime::Runtime;
use url::Url;

use super::{address, describe, tls};
use crate::fault::{Fault, Result};

/// LIMIT: answers of trackers are a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// LIMIT: a service that is not there must not keep a thread for longer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A client with a runtime of its own.
pub struct Caller {
    runtime: Option<Runtime>,
    client: Option<reqwest::Client>,
}

impl Drop for Caller {
    /// Drops the runtime without waiting for a name that is being looked up.
    fn drop(&mut self) {
        self.client = None;
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// The address and the method of a request.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// `GET`, `POST`, `PUT` or `PATCH`.
    pub method: &'a str,
    /// Address; it may hold secrets.
    pub url: &'a str,
    /// Type of the body.
    pub content_type: &'a str,
    /// Further headers; values are secrets and never shown.
    pub headers: &'a [(String, String)],
    /// The body that is sent.
    pub body: Vec<u8>,
}

impl Caller {
    /// Returns a client that also trusts the root certificates of `ca_file` (PEM).
    ///
    /// # Errors
    /// Config: `ca_file` cannot be used. Internal: no runtime can be started.
    pub fn new(ca_file: Option<&Path>) -> Result<Caller> {
        let client = tls::client_builder(ca_file)?
            .user_agent(concat!("hone/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(TIMEOUT)
            .timeout(TIMEOUT)
            // A token must not reach another host.
            .redirect(redirect::Policy::none())
            .referer(false)
            .dns_resolver(address::Resolver)
            .build()
            .map_err(|error| {
                Fault::config(format!("cannot set up HTTPS: {}", describe::innermost(&error)))
            })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Fault::machine("start the runtime for requests", &error))?;
        Ok(Caller { runtime: Some(runtime), client: Some(client) })
    }

    /// Returns the status and body of the answer; a text that says why there is none.
    pub fn call(&self, call: &Call) -> std::result::Result<(u16, Vec<u8>), String> {
        let method = Method::from_bytes(call.method.as_bytes()).map_err(|error| error.to_string())?;
        let url = Url::parse(call.url).map_err(|error| error.to_string())?;
        if address::forbidden_host(&url) {
            return Err(format!("{}, which hone refuses", address::Forbidden));
        }
        let client = self.client.as_ref().expect("there until it is dropped");
        let mut request = client.request(method, url).header("content-type", call.content_type);
        for (name, value) in call.headers {
            request = request.header(name, value);
        }
        let request = request.body(call.body.clone());
        let runtime = self.runtime.as_ref().expect("there until it is dropped");
        runtime.block_on(async {
            let failed = |error: reqwest::Error| describe::innermost(&error).to_string();
            let mut answer = request.send().await.map_err(failed)?;
            let status = answer.status().as_u16();
            let mut body = Vec::new();
            while let Some(part) = answer.chunk().await.map_err(failed)? {
                body.extend_from_slice(&part);
                if body.len() > ANSWER_BYTES_MAX {
                    return Err(format!("the answer has more than {ANSWER_BYTES_MAX} bytes"));
                }
            }
            Ok((status, body))
        })
    }
}

//! The body of an answer: whole, or in parts as they are generated.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::Full;
use hyper::Response;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value;
use tokio::sync::mpsc;

use super::error::Result;

/// An answer, or the error that is answered.
pub(super) type Answer = Result<Response<Reply>>;

/// The body of an answer: whole, or as it comes.
pub enum Reply {
    /// The whole body.
    Whole(Full<Bytes>),
    /// Parts as they are generated.
    Stream(mpsc::Receiver<Bytes>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Reply::Whole(body) => Pin::new(body).poll_frame(task),
            Reply::Stream(parts) => parts.poll_recv(task).map(|part| part.map(|part| Ok(Frame::data(part)))),
        }
    }

    /// Returns the length of a whole body, which stands in the answer's header.
    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(body) => body.size_hint(),
            Reply::Stream(_) => SizeHint::default(),
        }
    }
}

/// Returns a whole body of a content type.
pub(super) fn typed(bytes: Bytes, content_type: &'static str) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Full::new(bytes)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Returns a value as JSON.
pub(super) fn json_answer(value: &Value) -> Response<Reply> {
    typed(Bytes::from(value.to_string()), "application/json")
}

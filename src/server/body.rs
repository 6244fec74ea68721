//! The body of a request, as it arrives. The rest that no answer needs is read and thrown away.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::EXPECT;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// LIMIT: bytes of a body that are thrown away.
const REST_BYTES_MAX: usize = 64 << 20;
/// LIMIT: time in which the next bytes of the rest must come, and all of it.
const NEXT_TIMEOUT: Duration = Duration::from_secs(2);
const REST_TIMEOUT: Duration = Duration::from_secs(10);

/// A body. If it is dropped before its end, its rest is read, within limits: many clients read no answer before they
/// have sent everything, and a connection that is closed with bytes unread loses the answer that is on its way.
pub struct Received {
    body: Option<Incoming>,
    /// Whether the client sends the body: one that expects `100 Continue` waits until the body is read.
    sent: bool,
}

impl Received {
    /// The request with its body in this form.
    pub fn of(request: Request<Incoming>) -> Request<Received> {
        let sent = !request.headers().contains_key(EXPECT);
        request.map(|body| Received { body: Some(body), sent })
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let Some(body) = this.body.as_mut() else { return Poll::Ready(None) };
        this.sent = true;
        let frame = Pin::new(body).poll_frame(task);
        if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
            this.body = None;
        }
        frame
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let rest = self.body.take().filter(|body| self.sent && !body.is_end_stream());
        if let (Some(rest), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(timeout(REST_TIMEOUT, throw_away(rest)));
        }
    }
}

async fn throw_away(mut body: Incoming) {
    let mut bytes = 0;
    while let Ok(Some(Ok(frame))) = timeout(NEXT_TIMEOUT, body.frame()).await {
        bytes += frame.data_ref().map_or(0, Bytes::len);
        if bytes > REST_BYTES_MAX {
            return;
        }
    }
}

//! Blob -> one upload attempt, whole or in chunks. An attempt without progress ends.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Body;

use super::distribution::Client;
use super::image::Blob;
use super::trouble::{Nature, Trouble};
use crate::report::Task;

/// Size of the pieces in which a blob is read, sent and counted.
const PIECE_BYTES: u64 = 128 << 10;
/// Size of a chunk; GHCR refuses larger ones.
const CHUNK_BYTES: u64 = 4 << 20;
/// Slowest rate at which a registry hashes and stores a blob before it answers. A slower registry counts as silent.
const COMMIT_BYTES_PER_SECOND: u64 = 10_000_000;

/// Makes one attempt, in one PUT or in chunks. `before`: bytes of the task that belong to earlier blobs.
pub(super) async fn send(
    client: &Client,
    blob: &Blob,
    whole: bool,
    meter: &Arc<Meter>,
    before: u64,
    timeout: Duration,
) -> Result<(), Trouble> {
    meter.restart(before);
    let sent = match whole {
        true => watched(send_whole(client, blob, meter), meter, blob.bytes, timeout).await,
        false => watched(send_chunks(client, blob, meter), meter, blob.bytes, timeout).await,
    };
    match sent {
        // The registry answered 200 or 204 instead of 201, or gave no Location. The blob may be there in spite of
        // that.
        Err(trouble) if matches!(trouble.nature, Nature::Violation) => {
            match client.has_blob(&blob.digest).await {
                Ok(true) => Ok(()),
                _ => Err(trouble),
            }
        }
        sent => sent,
    }
}

async fn send_whole(client: &Client, blob: &Blob, meter: &Arc<Meter>) -> Result<(), Trouble> {
    let location = client.begin_upload().await?;
    client.finish_upload(location, &blob.digest, blob.bytes, body(blob, 0..blob.bytes, meter)).await
}

async fn send_chunks(client: &Client, blob: &Blob, meter: &Arc<Meter>) -> Result<(), Trouble> {
    let mut location = client.begin_upload().await?;
    let (mut start, mut kept) = (0, None);
    while start < blob.bytes {
        let chunk = start..blob.bytes.min(start + CHUNK_BYTES);
        start = chunk.end;
        let last;
        (location, last) = client.send_chunk(location, chunk.clone(), body(blob, chunk, meter)).await?;
        // Amazon's registry answers 201 to every chunk, but keeps only the first.
        if kept.is_some() && last.is_some() && last <= kept {
            return Err(Trouble::transient("the registry dropped a chunk of the upload"));
        }
        kept = last.or(kept);
    }
    client.finish_upload(location, &blob.digest, 0, Body::default()).await
}

fn body(blob: &Blob, bytes: Range<u64>, meter: &Arc<Meter>) -> Body {
    let pieces = Pieces { blob: blob.clone(), left: bytes, meter: meter.clone() };
    Body::wrap_stream(futures_util::stream::iter(pieces))
}

/// Ends an upload that makes no progress for the time-out. When all bytes are sent, the registry gets additional time
/// to store them.
async fn watched<T>(
    sending: impl Future<Output = Result<T, Trouble>>,
    meter: &Meter,
    bytes: u64,
    timeout: Duration,
) -> Result<T, Trouble> {
    let mut sending = std::pin::pin!(sending);
    loop {
        let seen = meter.sent.load(Ordering::Relaxed);
        let storing =
            if seen >= bytes { Duration::from_secs(bytes / COMMIT_BYTES_PER_SECOND) } else { Duration::ZERO };
        match tokio::time::timeout(timeout + storing, &mut sending).await {
            Ok(result) => return result,
            Err(_) if meter.sent.load(Ordering::Relaxed) != seen => {}
            Err(_) => {
                return Err(Trouble::transient(format!(
                    "no progress in {:?}, {seen} of {bytes} bytes sent",
                    timeout + storing
                )));
            }
        }
    }
}

/// Counts the sent bytes of the current blob, and shows them in a task.
pub(super) struct Meter {
    /// The task that shows them.
    pub task: Task,
    /// Sent bytes of the current blob.
    pub sent: AtomicU64,
}

impl Meter {
    fn restart(&self, before: u64) {
        self.sent.store(0, Ordering::Relaxed);
        self.task.set(before);
    }

    fn advance(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.task.advance(bytes);
    }
}

/// Reads a range of a blob piece by piece.
struct Pieces {
    blob: Blob,
    left: Range<u64>,
    meter: Arc<Meter>,
}

impl Iterator for Pieces {
    type Item = std::io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            return None;
        }
        let bytes = PIECE_BYTES.min(self.left.end - self.left.start);
        let piece = self.blob.read(self.left.start, bytes as usize);
        self.left.start += bytes;
        match &piece {
            Ok(piece) => self.meter.advance(piece.len() as u64),
            Err(_) => self.left.start = self.left.end,
        }
        Some(piece)
    }
}

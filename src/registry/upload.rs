//! Blob -> one upload attempt, whole or in chunks, that ends when it makes no progress.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};

use super::image::Blob;
use super::trouble::{Nature, Trouble};
use crate::report::Task;

/// The piece of a blob that is read, sent and counted at once.
const PIECE_BYTES: usize = 128 << 10;
/// GHCR refuses larger ones; oci-client cuts at the same length.
const CHUNK_BYTES: usize = 4 << 20;
/// A registry hashes and stores what it was sent before it answers; slower than this is taken for silence.
const COMMIT_BYTES_PER_SECOND: u64 = 10_000_000;
/// Logged in. Two clients, because reqwest's read timeout also runs while a body is being sent.
pub(super) struct Connection {
    pub quick: Client,
    pub monolithic: Client,
    pub auth: RegistryAuth,
}

impl Connection {
    /// One attempt: in one PUT, or in chunks.
    pub(super) async fn send(
        &self,
        reference: &Reference,
        blob: &Blob,
        whole: bool,
        meter: &Arc<Meter>,
        before: u64,
        timeout: Duration,
    ) -> std::result::Result<(), Trouble> {
        let (client, piece_bytes) =
            if whole { (&self.monolithic, PIECE_BYTES) } else { (&self.quick, CHUNK_BYTES) };
        meter.restart(before);
        let pieces = Pieces { blob: blob.clone(), offset: 0, piece_bytes, meter: meter.clone() };
        let pieces = futures_util::stream::iter(pieces.map(|piece| Ok(piece?.into())));
        let sending = async {
            let pushed = client.push_blob_stream(reference, pieces, &blob.digest, Some(blob.bytes)).await;
            pushed.map_err(Trouble::from)
        };
        match watched(sending, meter, blob.bytes, timeout).await {
            Ok(_) => Ok(()),
            // 200 or 204 for 201, or no Location: the blob may well be there.
            Err(trouble) if matches!(trouble.nature, Nature::Violation) => {
                match exists(self, reference, &blob.digest).await {
                    Ok(true) => Ok(()),
                    _ => Err(trouble),
                }
            }
            Err(trouble) => Err(trouble),
        }
    }
}

/// Whether the registry has the blob. A refusal counts as no: the upload will be told why, and HEAD has no words.
pub(super) async fn exists(
    connection: &Connection,
    reference: &Reference,
    digest: &str,
) -> std::result::Result<bool, Trouble> {
    match connection.quick.blob_exists(reference, digest).await.map_err(Trouble::from) {
        Err(trouble) if trouble.status.is_some() => Ok(false),
        other => other,
    }
}

/// Ends an upload that makes no progress for the time-out; once all is sent, the registry gets time to store it.
async fn watched<T>(
    sending: impl Future<Output = std::result::Result<T, Trouble>>,
    meter: &Meter,
    bytes: u64,
    timeout: Duration,
) -> std::result::Result<T, Trouble> {
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

/// Bytes of the current blob that went out, and the task that shows them.
pub(super) struct Meter {
    pub task: Task,
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

/// A blob from its start, piece by piece.
struct Pieces {
    blob: Blob,
    offset: u64,
    piece_bytes: usize,
    meter: Arc<Meter>,
}

impl Iterator for Pieces {
    type Item = std::io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.blob.bytes {
            return None;
        }
        let piece = self.blob.read(self.offset, self.piece_bytes);
        match &piece {
            Ok(piece) => {
                self.offset += piece.len() as u64;
                self.meter.advance(piece.len() as u64);
            }
            Err(_) => self.offset = self.blob.bytes,
        }
        Some(piece)
    }
}

//! Image -> registry, and back: the requests in their order, with retries, fallback and renewed login.
//!
//! Upload order: HEAD; then one PUT; if that is refused or breaks, chunks of 4 MiB. The manifest is written last and
//! read back by tag. Every attempt starts the blob from the beginning, because adapters are small and registries
//! differ in how uploads resume.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use oci_client::Reference;
use reqwest::StatusCode;
use tokio::runtime::Runtime;

use super::credentials::{self, Credential, Login};
use super::distribution::Client;
use super::growing::{Growing, Part};
use super::image::{Blob, Hashing, Image, digest_of, scratch_file};
use super::manifest::{self, Descriptor, MANIFEST_TYPE};
use super::options::Options;
use super::store::Store;
use super::trouble::{Nature, Trouble, clean};
use super::upload::{self, Meter};
use crate::backoff;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage, Task, Unit};
use crate::source::{Pace, Speed};

/// The longest pause before the first repetition. It doubles with each failure up to `BACKOFF_MAX`; up to half of a
/// pause is left out at random.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The purpose of the connection. It decides scopes, kinds of faults and advice.
#[derive(Clone, Copy)]
enum Purpose<'a> {
    /// Pushing the adapter of this folder.
    Push(&'a Path),
    /// Pulling; the volume of this folder has room for a layer.
    Pull(&'a Path),
}

/// One repository of a registry, with a runtime for its requests. It must not be used inside an asynchronous task.
pub(super) struct Registry<'a> {
    runtime: Runtime,
    remote: Remote<'a>,
}

struct Remote<'a> {
    reference: Reference,
    options: &'a Options,
    credential: Credential,
    purpose: Purpose<'a>,
    report: &'a Report,
    client: Client,
}

/// Pushes the image under the reference's tag, and reads the tag back.
///
/// Auth: 401, 403, or unusable credentials. Config: the registry refused permanently, or its certificate is not
/// trusted. Push: all attempts failed.
pub(super) fn push(
    image: &Image,
    folder: &Path,
    reference: Reference,
    options: &Options,
    report: &Report,
    task: Task,
) -> Result<()> {
    let Registry { runtime, mut remote } = Registry::open(reference, options, Purpose::Push(folder), report)?;
    let meter = Arc::new(Meter { task, sent: AtomicU64::new(0) });
    let work = async {
        remote.upload(&image.layer, &meter, 0).await?;
        remote.upload(&image.config, &meter, image.layer.bytes).await?;
        remote.tag(&image.manifest).await?;
        meter.task.set(image.bytes());
        remote.confirm(&image.manifest.digest).await
    };
    let stopped = || {
        Fault::new(
            Kind::Interrupted,
            format!("stopped by a signal while pushing; the adapter is in {}", folder.display()),
        )
        .help("start it again: only the push is left")
    };
    runtime.block_on(interrupt::or_stopped(work, stopped))
}

impl<'a> Registry<'a> {
    /// Connects for pulling. Layers are stored on the volume of `scratch` meanwhile.
    pub(super) fn source(
        reference: Reference,
        options: &'a Options,
        scratch: &'a Path,
        report: &'a Report,
    ) -> Result<Registry<'a>> {
        Registry::open(reference, options, Purpose::Pull(scratch), report)
    }

    fn open(
        reference: Reference,
        options: &'a Options,
        purpose: Purpose<'a>,
        report: &'a Report,
    ) -> Result<Registry<'a>> {
        let credential = credentials::find(&reference, options.docker_config.as_deref())?;
        let push = matches!(purpose, Purpose::Push(_));
        let client = Client::new(&reference, &credential.login, push, options)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Fault::machine("start the network runtime", &error))?;
        let remote = Remote { reference, options, credential, purpose, report, client };
        Ok(Registry { runtime, remote })
    }
}

impl Registry<'_> {
    /// Completes the file at `path`, which may hold the beginning of the part. If it fails, the bytes received stay.
    pub(super) fn complete(&mut self, part: &Part, path: &Path) -> Result<()> {
        let work = self.remote.complete(part, path);
        self.runtime.block_on(interrupt::or_stopped(work, interrupt::stopped))
    }
}

fn while_pulling() -> Fault {
    Fault::new(Kind::InterruptedUnsaved, "stopped by a signal while pulling; nothing was written")
        .help("start it again")
}

impl Store for Registry<'_> {
    fn top(&mut self) -> Result<(Vec<u8>, String)> {
        let (tag, digest) = (self.remote.tag_name(), self.remote.reference.digest().map(str::to_string));
        let name = digest.unwrap_or(tag);
        self.runtime.block_on(interrupt::or_stopped(self.remote.fetch_manifest(&name), while_pulling))
    }

    fn manifest(&mut self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let work = self.remote.fetch_manifest(&descriptor.digest);
        Ok(self.runtime.block_on(interrupt::or_stopped(work, while_pulling))?.0)
    }

    fn layer(&mut self, descriptor: &Descriptor) -> Result<File> {
        self.runtime.block_on(interrupt::or_stopped(self.remote.fetch_layer(descriptor), while_pulling))
    }
}

impl Remote<'_> {
    /// Makes sure that the registry has the blob. `before`: bytes of the task that belong to earlier blobs.
    async fn upload(&mut self, blob: &Blob, meter: &Arc<Meter>, before: u64) -> Result<()> {
        let timeout = self.options.read_timeout;
        let mut whole = true;
        self.repeat("upload", async |client| {
            if client.has_blob(&blob.digest).await? {
                meter.task.set(before + blob.bytes);
                return Ok(());
            }
            let mut sent = upload::send(client, blob, whole, meter, before, timeout).await;
            if whole && sent.as_ref().is_err_and(Trouble::refuses_monolithic) {
                whole = false;
                sent = upload::send(client, blob, whole, meter, before, timeout).await;
            }
            // Proxies with a size limit close the connection in the middle instead of answering 413.
            if sent.as_ref().is_err_and(|trouble| trouble.status.is_none())
                && meter.sent.load(Ordering::Relaxed) > 0
            {
                whole = !whole;
            }
            sent
        })
        .await
    }

    async fn tag(&mut self, manifest: &Blob) -> Result<()> {
        let tag = self.tag_name();
        let bytes = manifest
            .read(0, usize::MAX)
            .map_err(|error| Fault::internal(format!("cannot read the manifest from memory: {error}")))?;
        self.repeat("upload of the manifest", async |client| client.put_manifest(&tag, bytes.clone()).await)
            .await
    }

    /// Checks that the tag now leads to the pushed manifest.
    async fn confirm(&mut self, digest: &str) -> Result<()> {
        let tag = self.tag_name();
        self.repeat("reading the manifest back", async |client| {
            let read = client.manifest(&tag, &[MANIFEST_TYPE]).await;
            let bytes = read.map_err(|trouble| match trouble.status {
                // Some registries show a new tag only after a moment.
                Some(404) => Trouble { nature: Nature::Transient, ..trouble },
                _ => trouble,
            })?;
            match digest_of(&bytes) {
                found if found == digest => Ok(()),
                found => Err(Trouble::transient(format!("pushed {digest}, but the tag leads to {found}"))),
            }
        })
        .await
    }

    fn tag_name(&self) -> String {
        self.reference.tag().unwrap_or("latest").to_string()
    }

    /// Downloads a manifest and returns it with its digest. `name` is a tag or a digest.
    async fn fetch_manifest(&mut self, name: &str) -> Result<(Vec<u8>, String)> {
        self.repeat("download of the manifest", async |client| {
            let accepted = [
                MANIFEST_TYPE,
                manifest::INDEX_TYPE,
                manifest::DOCKER_MANIFEST_TYPE,
                manifest::DOCKER_INDEX_TYPE,
            ];
            let bytes = client.manifest(name, &accepted).await?;
            let digest = digest_of(&bytes);
            match name.contains(':') && name != digest {
                true => Err(Trouble::transient(format!("asked for {name}, got {digest}"))),
                false => Ok((bytes, digest)),
            }
        })
        .await
    }

    async fn fetch_layer(&mut self, descriptor: &Descriptor) -> Result<File> {
        let Purpose::Pull(scratch) = self.purpose else {
            return Err(Fault::internal("a layer is fetched while pushing"));
        };
        let task =
            self.report.task(Stage::Pull, Unit::Bytes, short(&descriptor.digest), Some(descriptor.bytes));
        self.repeat("download of a layer", async |client| {
            task.set(0);
            let storage = |error: std::io::Error| Fault::storage("write a layer beside", scratch, &error);
            let mut file = Hashing::new(scratch_file(scratch)?);
            let (mut answer, mut bytes) = (client.blob(&descriptor.digest, 0).await?, 0);
            let mut pace = Pace::new(Speed::LEAST);
            while let Some(piece) = answer.chunk().await? {
                bytes += piece.len() as u64;
                if bytes > descriptor.bytes {
                    let expected = descriptor.bytes;
                    let fault = Fault::data(format!("the layer is longer than its {expected} bytes"));
                    return Err(fault.help("the registry's copy is damaged: push it again").into());
                }
                pace.arrived(piece.len()).map_err(Trouble::transient)?;
                file.write_all(&piece).map_err(storage)?;
                task.set(bytes);
            }
            let (mut file, digest, bytes) = file.finish();
            if digest != descriptor.digest || bytes != descriptor.bytes {
                return Err(Trouble::transient(format!(
                    "asked for {}, got {bytes} bytes of {digest}",
                    descriptor.digest
                )));
            }
            file.rewind().map_err(storage)?;
            Ok(file)
        })
        .await
    }

    async fn complete(&mut self, part: &Part, path: &Path) -> Result<()> {
        let name = part.title.as_deref().map_or_else(|| short(&part.digest), |title| clean(title, &[]));
        let (report, image) = (self.report, self.reference.to_string());
        let task = report.task(Stage::Pull, Unit::Bytes, name.as_str(), Some(part.bytes));
        let (mut file, mut damaged) = (Growing::open(path)?, false);
        self.repeat("download of a layer", async |client| {
            loop {
                let (before, began) = (file.bytes(), Instant::now());
                let continued = resume(client, part, &mut file, &task).await;
                match continued {
                    Ok(()) => break,
                    // An attempt that received some bytes does not count as failed: a blob can take hours, and
                    // connections end sooner.
                    Err(trouble)
                        if matches!(trouble.nature, Nature::Transient)
                            && file.bytes() > before
                            && !Speed::LEAST.is_stalled(file.bytes() - before, began.elapsed()) =>
                    {
                        let (bytes, total) = (file.bytes(), part.bytes);
                        let text = clean(&trouble.text, &client.secrets());
                        report.warn(
                            Stage::Pull,
                            format!("{name}: {text}; continued at byte {bytes} of {total}"),
                        );
                        tokio::time::sleep(trouble.wait.unwrap_or_else(|| pause(1))).await;
                    }
                    Err(trouble) => return Err(trouble),
                }
            }
            let digest = file.digest()?;
            if digest == part.digest {
                return Ok(());
            }
            file.empty()?;
            let text = format!("{name}: asked for {}, got {digest}", part.digest);
            if damaged {
                return Err(Fault::model(format!("{image}: {text}"))
                    .help("the registry's copy is damaged: push it again")
                    .into());
            }
            // The bytes were damaged on the way, or the beginning on disk was. A full download shows which.
            damaged = true;
            Err(Trouble::transient(text))
        })
        .await
    }

    /// Runs an operation until it succeeds, is refused, or has used its attempts. Logs in first, and once more after
    /// a 401, because a token may have expired during a long upload or by a wrong clock.
    async fn repeat<T>(
        &mut self,
        doing: &str,
        mut operation: impl AsyncFnMut(&Client) -> std::result::Result<T, Trouble>,
    ) -> Result<T> {
        let (mut attempt, mut renewed) = (1, false);
        loop {
            let result = match self.client.log_in().await {
                Ok(()) => operation(&self.client).await,
                Err(trouble) => Err(trouble),
            };
            let trouble = match result {
                Ok(value) => return Ok(value),
                Err(trouble) => trouble,
            };
            let transient = matches!(trouble.nature, Nature::Transient);
            if trouble.status == Some(401) && self.client.is_logged_in() && !renewed {
                renewed = true;
                self.client.log_out();
            } else if transient && attempt < self.options.attempts_max {
                let wait = trouble.wait.unwrap_or_else(|| pause(attempt));
                self.warn(doing, &trouble, wait);
                tokio::time::sleep(wait).await;
                attempt += 1;
            } else {
                return Err(self.fault(doing, trouble, attempt));
            }
        }
    }

    fn warn(&self, doing: &str, trouble: &Trouble, wait: Duration) {
        let stage = if matches!(self.purpose, Purpose::Push(_)) { Stage::Push } else { Stage::Pull };
        let text = clean(&trouble.text, &self.client.secrets());
        self.report.warn(stage, format!("{doing}: {text}; again in {:.1} s", wait.as_secs_f64()));
    }

    fn fault(&self, doing: &str, trouble: Trouble, attempts: u32) -> Fault {
        let (image, source) = (&self.reference, &self.credential.source);
        let text = clean(&trouble.text, &self.client.secrets());
        let (exhausted, safe) = match self.purpose {
            Purpose::Push(folder) => (
                Kind::Push,
                format!("the adapter is safe in {0}; run `hone push {0} {image}`", folder.display()),
            ),
            Purpose::Pull(_) => (Kind::Network, "try again when the registry can be reached".to_string()),
        };
        match trouble.nature {
            Nature::Ours(fault) => *fault,
            Nature::Unauthorized => {
                let with = match self.credential.login {
                    Login::Anonymous => format!("no credentials: {source}"),
                    _ => format!("credentials of {source}"),
                };
                Fault::auth(format!("{image}: {doing}: the registry refused ({with}): {text}")).help(
                    match self.purpose {
                        Purpose::Push(_) => {
                            format!("give credentials that may push to this repository; {safe}")
                        }
                        Purpose::Pull(_) => "give credentials that may pull from this repository".into(),
                    },
                )
            }
            Nature::Untrusted { help } => {
                Fault::config(format!("{image}: {doing}: the TLS connection failed: {text}")).help(help)
            }
            Nature::Rejected | Nature::Violation => Fault::config(format!(
                "{image}: {doing}: the registry refused: {text}"
            ))
            .help(match self.purpose {
                Purpose::Push(_) => format!("correct what the registry names; {safe}"),
                Purpose::Pull(_) => "check the image's name and tag".into(),
            }),
            Nature::Transient => {
                Fault::new(exhausted, format!("{image}: {doing} failed after {attempts} attempts: {text}"))
                    .help(safe)
            }
        }
    }
}

/// Requests the bytes that the file lacks, and appends the bytes received.
async fn resume(
    client: &Client,
    part: &Part,
    file: &mut Growing<'_>,
    task: &Task,
) -> std::result::Result<(), Trouble> {
    if file.bytes() > part.bytes {
        file.empty()?;
    }
    task.set(file.bytes());
    if file.bytes() == part.bytes {
        return Ok(());
    }
    let mut answer = match client.blob(&part.digest, file.bytes()).await {
        Err(trouble) if trouble.status == Some(416) => {
            file.empty()?;
            return Err(Trouble::transient(trouble.text));
        }
        answer => answer?,
    };
    if answer.status() != StatusCode::PARTIAL_CONTENT && file.bytes() > 0 {
        file.empty()?;
        task.set(0);
    }
    let mut pace = Pace::new(Speed::LEAST);
    while let Some(piece) = answer.chunk().await? {
        if file.bytes() + piece.len() as u64 > part.bytes {
            file.empty()?;
            let fault = Fault::model(format!("the layer is longer than its {} bytes", part.bytes));
            return Err(fault.help("the registry's copy is damaged: push it again").into());
        }
        pace.arrived(piece.len()).map_err(Trouble::transient)?;
        file.append(&piece)?;
        task.set(file.bytes());
    }
    match file.bytes() == part.bytes {
        true => Ok(()),
        false => {
            Err(Trouble::transient(format!("the body ended after {} of {} bytes", file.bytes(), part.bytes)))
        }
    }
}

fn pause(failures: u32) -> Duration {
    backoff::pause(BACKOFF_FIRST, BACKOFF_MAX, failures)
}

/// Returns `sha256:` and twelve digits, for a progress line.
fn short(digest: &str) -> String {
    digest.chars().take(19).collect()
}

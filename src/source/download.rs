//! One URL -> a whole file of the cache. Each attempt resumes where the last one stopped, until the file is whole
//! and verified.

use std::cell::OnceCell;
use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use url::Url;

use super::cache::{Blob, Cache, Entry, Slot};
use super::failure::Failure;
use super::http::{self, Ask};
use super::hub::Hub;
use super::options::{File, Options};
use super::pace::Pace;
use super::partial::Partial;
use super::scheme::{self, Stores};
use super::statement::Algorithm;
use super::{describe, html, local, missing, split};
use crate::backoff;
use crate::fault::{Fault, Kind, Result};
use crate::report::{Report, Stage, Task, Unit};
use crate::words;

const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// LIMIT: a month, so that no setting overflows the clock.
const TOTAL_TIMEOUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Bytes that suffice for a page's title.
const HEAD_BYTES: u64 = 4096;

/// All downloads of one `fetch`. They share the cache and, when first needed, the HTTP client and the hub's token.
pub struct Downloads<'a> {
    options: &'a Options,
    report: &'a Report,
    cache: Cache,
    network: OnceCell<Network>,
}

/// The parts that only downloads need.
struct Network {
    client: reqwest::Client,
    /// The client for signed requests, which follows no redirect.
    direct: reqwest::Client,
    stores: Stores,
    hub: Hub,
}

/// The download of one file.
struct Job<'a> {
    url: &'a Url,
    name: &'a str,
    expected: Option<&'a str>,
    deadline: Instant,
    task: Task,
}

/// The success of an attempt.
enum Received {
    Unchanged,
    Whole,
}

impl<'a> Downloads<'a> {
    /// Downloads with these settings.
    pub fn new(options: &'a Options, report: &'a Report) -> Downloads<'a> {
        Downloads { options, report, cache: Cache::new(&options.cache), network: OnceCell::new() }
    }

    /// Returns the file behind `url`, from the cache if that is still the newest. `name` is the URL without
    /// secrets.
    pub async fn file(&self, url: &Url, name: &str, expected: Option<&str>) -> Result<File> {
        let deadline = Instant::now() + self.options.total_timeout.min(TOTAL_TIMEOUT_MAX);
        if let Some(blob) = self.pinned(expected)? {
            return Ok(self.done(name, blob, "from the cache, by its digest"));
        }
        let slot = self.cache.slot(url, name, deadline).await?;
        self.finish(&slot, expected)?;
        // `finish`, or another process while this one waited, may have completed it.
        if let Some(blob) = self.pinned(expected)? {
            return Ok(self.done(name, blob, "from the cache, by its digest"));
        }
        let task = self.report.task(Stage::Download, Unit::Bytes, name, None);
        let job = Job { url, name, expected, deadline, task };
        let cached = self.cached(&job, &slot)?;
        match self.download(&job, &slot, cached.as_ref().map(|(entry, _)| entry)).await {
            Ok(Some((blob, checked))) => Ok(self.done(name, blob, &format!("downloaded, {checked}"))),
            Ok(None) => {
                let (_, blob) = cached.expect("only a cached file can be unchanged");
                Ok(self.done(name, blob, "from the cache, unchanged on the server"))
            }
            // The job may be a restarted one whose signed URL has expired, or its server may be down for a while.
            Err(fault) if cached.is_some() && matches!(fault.kind, Kind::Network | Kind::Auth) => {
                self.report.warn(Stage::Download, format!("{}; the cached file is used", fault.message));
                let (_, blob) = cached.expect("checked above");
                Ok(self.done(name, blob, "from the cache, not compared with the server"))
            }
            Err(fault) => Err(fault),
        }
    }

    /// Returns the files that an address names, each with its name for messages. These are the address itself, or
    /// the objects of a store below a folder or matching a pattern.
    pub async fn expand(&self, url: &Url, name: &str, expected: Option<&str>) -> Result<Vec<(Url, String)>> {
        let path = percent_decoded(url.path());
        let is_pattern = path.contains(['*', '?', '[']);
        if scheme::of(url).is_none() || !(is_pattern || path.len() <= 1 || path.ends_with('/')) {
            return Ok(vec![(url.clone(), name.to_owned())]);
        }
        let mut below = url.clone();
        if is_pattern {
            let fixed = path.split(['*', '?', '[']).next().unwrap_or_default();
            below.set_path(fixed.rsplit_once('/').map_or("", |(folder, _)| folder));
        }
        let mut objects = self.network()?.stores.list(&below).await?;
        // As in a local folder, hidden files and Spark's `_SUCCESS` and `_temporary/` are skipped.
        objects.retain(|object| !object.name.split('/').any(|part| part.starts_with(['.', '_'])));
        let found = match is_pattern {
            true => local::matching(objects, path.trim_start_matches('/'), |object| {
                percent_decoded(object.url.path())
            })?,
            false => {
                let names = |object: &scheme::Object| object.name.clone();
                let found = local::of_first_kind(objects, names, name, self.options.endings, self.report)?;
                split::tell_of_others(name, found.iter().map(|object| object.name.as_str()), self.report);
                found
            }
        };
        match expected {
            Some(_) if found.len() > 1 => Err(Fault::config(format!(
                "{name}: one sha256 is given, but {} objects are found",
                found.len()
            ))
            .help("name each object with its own digest")),
            _ => Ok(found.into_iter().map(|object| (object.url.clone(), object.url.to_string())).collect()),
        }
    }

    fn pinned(&self, expected: Option<&str>) -> Result<Option<Blob>> {
        expected.map_or(Ok(None), |sha256| self.cache.find(sha256, self.report))
    }

    /// Keeps a download whose process was killed between the last byte and the rename.
    fn finish(&self, slot: &Slot, expected: Option<&str>) -> Result<()> {
        let partial = slot.partial()?;
        let sha256 = partial.sha256();
        let is_right = match expected {
            Some(expected) => expected == sha256,
            None => partial.check()?.is_none_or(|(_, holds)| holds),
        };
        if partial.is_whole() && is_right {
            self.cache.keep(slot, partial, &sha256)?;
        }
        Ok(())
    }

    /// Returns the whole file that this URL gave before, if it is the expected one.
    fn cached(&self, job: &Job, slot: &Slot) -> Result<Option<(Entry, Blob)>> {
        let Some(entry) =
            slot.entry().filter(|entry| job.expected.is_none_or(|sha256| sha256 == entry.sha256))
        else {
            return Ok(None);
        };
        let blob = self.cache.find(&entry.sha256, self.report)?;
        Ok(blob.filter(|blob| blob.bytes == entry.bytes).map(|blob| (entry, blob)))
    }

    /// Makes attempts until the file is whole. `None`: the cached file is the newest.
    async fn download(
        &self,
        job: &Job<'_>,
        slot: &Slot,
        cached: Option<&Entry>,
    ) -> Result<Option<(Blob, Checked)>> {
        let network = self.network()?;
        let mut partial = slot.partial()?;
        let mut farthest = partial.bytes();
        let (mut attempts, mut failures, mut mismatched) = (0, 0, false);
        loop {
            attempts += 1;
            let (before, began) = (partial.bytes(), Instant::now());
            let attempt = self.attempt(network, job, &mut partial, cached);
            let ended = match timeout_at(job.deadline, attempt).await {
                Ok(ended) => ended,
                Err(_) => return Err(self.out_of_time(job, &partial, attempts)),
            };
            // An attempt that received new bytes resets the count, even if it failed in the end.
            let stalled =
                self.options.speed.is_stalled(partial.bytes().saturating_sub(before), began.elapsed());
            if partial.bytes() > farthest && !stalled {
                (farthest, failures) = (partial.bytes(), 0);
            }
            match ended {
                Ok(Received::Unchanged) => return Ok(None),
                Ok(Received::Whole) => {
                    let sha256 = partial.sha256();
                    let stated = if job.expected.is_none() { partial.check()? } else { None };
                    let Some((fault, cause)) = unexpected(job, &sha256).or_else(|| contradicted(job, stated))
                    else {
                        let checked = Checked::of(job.expected, stated.map(|(algorithm, _)| algorithm));
                        return Ok(Some((self.cache.keep(slot, partial, &sha256)?, checked)));
                    };
                    partial.discard()?;
                    if mismatched {
                        return Err(fault);
                    }
                    // Either the transfer was damaged or a wrong beginning was resumed. One full download will show
                    // which.
                    (mismatched, farthest, failures) = (true, 0, 0);
                    self.pause(job, attempts, failures, &cause, None).await?;
                }
                Err(Failure::Fatal(fault)) => return Err(fault),
                Err(Failure::Retry { cause, after, from_start }) => {
                    failures += 1;
                    if from_start {
                        partial.discard()?;
                    }
                    self.pause(job, attempts, failures, &cause, after).await?;
                }
            }
        }
    }

    /// Waits before the next attempt, or returns the fault if there must be none.
    async fn pause(
        &self,
        job: &Job<'_>,
        attempts: u32,
        failures: u32,
        cause: &str,
        after: Option<Duration>,
    ) -> Result<()> {
        let failed = || format!("{}: gave up at attempt {attempts}: {cause}", job.name);
        let help = "the bytes received so far are kept; run it again when the server answers";
        if failures >= self.options.attempts_max {
            return Err(Fault::network(failed()).help(help));
        }
        let wait = backoff::pause(self.options.backoff, BACKOFF_MAX, failures).max(after.unwrap_or_default());
        if wait >= job.deadline.saturating_duration_since(Instant::now()) {
            let allowed = self.options.total_timeout;
            return Err(Fault::network(format!(
                "{}; the next attempt could start in {wait:.1?}, after the {allowed:?} allowed for one file",
                failed()
            ))
            .help(help));
        }
        self.report.warn(Stage::Download, format!("{}: {cause}; again in {wait:.1?}", job.name));
        sleep(wait).await;
        Ok(())
    }

    /// Makes one request and takes as much of its body as arrives.
    async fn attempt(
        &self,
        network: &Network,
        job: &Job<'_>,
        partial: &mut Partial,
        cached: Option<&Entry>,
    ) -> http::Attempted<Received> {
        let cached = cached.map(|entry| &entry.validators).filter(|validators| !validators.is_empty());
        let signed = match scheme::of(job.url) {
            Some(scheme) => {
                let request = network.stores.request(job.url, partial.bytes(), partial.validators(), cached);
                let (url, headers) = request.await?;
                Some((url, headers, scheme.help))
            }
            None => None,
        };
        let client = if signed.is_some() { &network.direct } else { &network.client };
        let ask = Ask {
            url: job.url,
            name: job.name,
            have: partial.bytes(),
            version: partial.validators(),
            total: partial.total(),
            hub: Some(&network.hub).filter(|hub| hub.owns(job.url)),
            signed,
            cached,
        };
        let Some(mut body) = http::get(client, &ask, self.options).await? else {
            return Ok(Received::Unchanged);
        };
        if body.start == 0 {
            partial.restart(&body.validators, body.total, body.statement.take())?;
        }
        job.task.set(partial.bytes());
        if let Some(total) = body.total {
            job.task.set_total(total);
            self.check_limit(job, partial, total)?;
            self.cache.check_space(job.name, total.saturating_sub(partial.bytes()))?;
        }
        let mut pace = Pace::new(self.options.speed);
        while let Some(chunk) =
            body.response.chunk().await.map_err(|error| describe::failure(&error, job.name, self.options))?
        {
            self.check_limit(job, partial, partial.bytes() + chunk.len() as u64)?;
            partial.append(&chunk)?;
            job.task.advance(chunk.len() as u64);
            let whole = body.total == Some(partial.bytes());
            pace.arrived(chunk.len())
                .or_else(|slow| if whole { Ok(()) } else { Err(Failure::retry(slow)) })?;
        }
        match body.total {
            Some(total) if partial.bytes() < total => {
                Err(Failure::retry(format!("the body ended after {} of {total} bytes", partial.bytes())))
            }
            Some(total) if partial.bytes() > total => {
                Err(Failure::from_start(format!("the body is longer than the announced {total} bytes")))
            }
            _ => self.check_page(job, partial, body.is_html).map(|()| Received::Whole),
        }
    }

    fn check_limit(&self, job: &Job, partial: &mut Partial, bytes: u64) -> Result<()> {
        let limit = self.options.file_bytes_max;
        if bytes <= limit {
            return Ok(());
        }
        partial.discard()?;
        Err(Fault::capacity(format!(
            "{}: at least {bytes} bytes, the limit for one file is {limit} ({})",
            job.name,
            words::size(limit)
        ))
        .help("raise file_bytes_max (--file-bytes-max) if the file is meant to be that large"))
    }

    /// Refuses a web page instead of data.
    fn check_page(&self, job: &Job, partial: &mut Partial, is_html: bool) -> http::Attempted<()> {
        let ending = self.options.endings.iter().flat_map(|kind| kind.iter()).find(|ending| {
            let path = job.url.path().to_ascii_lowercase();
            path.strip_suffix(**ending).is_some_and(|stem| stem.ends_with('.'))
        });
        if !is_html && ending.is_none() {
            return Ok(());
        }
        let head = partial.head(HEAD_BYTES)?;
        if !html::looks_like_html(&head) {
            return Ok(());
        }
        partial.discard()?;
        let title = html::title(&head).map(|title| format!(" (title: {title})")).unwrap_or_default();
        let wanted = ending.map_or("a data file".to_owned(), |ending| format!("a {ending} file"));
        let help = match missing::hub_dataset(job.name) {
            Some(dataset) => format!(
                "for the dataset, write hf://datasets/{dataset}; for one file, use its address with /resolve/"
            ),
            None => "this may be a login page or a preview link; use the raw/resolve link".to_owned(),
        };
        Err(Fault::data(format!("{}: URL returned an HTML page{title}, expected {wanted}", job.name))
            .help(help)
            .into())
    }

    fn out_of_time(&self, job: &Job, partial: &Partial, attempts: u32) -> Fault {
        let total = partial.total().map(|total| format!(" of {total}")).unwrap_or_default();
        Fault::network(format!(
            "{}: not complete after the {:?} allowed for one file: {}{total} bytes by attempt {attempts}",
            job.name,
            self.options.total_timeout,
            partial.bytes()
        ))
        .help("the bytes received so far are kept; run it again, or allow more time")
    }

    fn network(&self) -> Result<&Network> {
        if self.network.get().is_none() {
            let network = Network {
                client: http::client(self.options)?,
                direct: http::direct_client(self.options)?,
                stores: Stores::new(self.options)?,
                hub: Hub::from_environment()?,
            };
            // The cell was empty until now, and this runs on one thread.
            let _ = self.network.set(network);
        }
        Ok(self.network.get().expect("just set"))
    }

    fn done(&self, name: &str, blob: Blob, how: &str) -> File {
        let Blob { path, bytes, sha256 } = blob;
        let text = format!("{name}: {}, sha256 {}, {how}", words::size(bytes), &sha256[..12]);
        self.report.note(Stage::Download, text);
        File { path, name: name.to_owned(), bytes, sha256, entry: 0 }
    }
}

/// Returns a URL's path as text.
fn percent_decoded(path: &str) -> String {
    object_store::path::Path::from_url_path(path).map_or_else(
        |_| path.to_owned(),
        |decoded| {
            let end = if path.ends_with('/') && path.len() > 1 { "/" } else { "" };
            format!("/{decoded}{end}")
        },
    )
}

/// Returns the fault of a file without the given digest, and its cause in a few words.
fn unexpected(job: &Job, sha256: &str) -> Option<(Fault, String)> {
    let expected = job.expected.filter(|&expected| expected != sha256)?;
    let cause = format!("its sha256 is {sha256}, not the expected one");
    Some((local::mismatch(job.name, expected, sha256), cause))
}

/// Returns the same for the digest that the server itself stated.
fn contradicted(job: &Job, stated: Option<(Algorithm, bool)>) -> Option<(Fault, String)> {
    let (algorithm, _) = stated.filter(|(_, holds)| !holds)?;
    let cause = format!("its {algorithm} is not the one that the server states");
    let fault = Fault::network(format!("{}: downloaded twice, and both times {cause}", job.name))
        .help("something between the server and here changes the bytes, or the server's own record is wrong");
    Some((fault, cause))
}

/// The digests that a downloaded file was compared with.
enum Checked {
    Given,
    Stated(Algorithm),
    Nothing,
}

impl Checked {
    fn of(expected: Option<&str>, stated: Option<Algorithm>) -> Checked {
        match (expected, stated) {
            (Some(_), _) => Checked::Given,
            (None, Some(algorithm)) => Checked::Stated(algorithm),
            (None, None) => Checked::Nothing,
        }
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Checked::Given => f.write_str("checked by the given sha256"),
            Checked::Stated(algorithm) => write!(f, "checked by the server's {algorithm}"),
            Checked::Nothing => f.write_str("compared with no digest: the server states none"),
        }
    }
}

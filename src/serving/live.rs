//! A file of adapters and mixes -> what a running server answers with, as often as the file changes.
//!
//! A controller writes the file (a mounted ConfigMap) and needs no connection to the server; a server that starts later
//! reads the same file. A change is applied whole or not at all. If an adapter cannot be fetched or does not fit, the
//! served adapters stay as they are, and `/v1/models` says why.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::backoff;
use crate::fault::{Fault, Result};
use crate::generate::Strength;
use crate::interrupt;
use crate::plain;
use crate::report::{Report, Stage};
use crate::server::model::{Bring, Brought, FileState};
use crate::server::{self, Model};
use crate::source;

/// LIMIT: a ConfigMap has 1 MiB at most.
const FILE_BYTES_MAX: u64 = 1 << 20;
const STRENGTH: std::ops::RangeInclusive<f32> = -16.0..=16.0;
/// The interval at which the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// The first pause before what was refused is tried again; it doubles up to the longest. A Secret may have been mended
/// since, or an image pushed.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(600);

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default)]
    adapters: Vec<Adapter>,
    #[serde(default)]
    mixes: Vec<Mix>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Adapter {
    name: String,
    source: String,
}

/// A mix in the form of `POST /v1/mixes`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mix {
    name: String,
    adapters: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    name: String,
    strength: f32,
}

/// Returns the digest of the file's text, which its writer compares with the digest of the written text.
pub fn file_digest(text: &str) -> String {
    format!("sha256:{}", source::digest(text.as_bytes()))
}

/// The file, and the part of it that is served.
pub struct Live {
    file: PathBuf,
    model: Arc<Model>,
    bring: Bring,
    report: Report,
    /// Names that flags gave; the file cannot take them.
    fixed: Vec<String>,
    /// The content that was taken last.
    served: Wanted,
    /// The text that was looked at last.
    text: Option<String>,
    /// The time of the next attempt, and the number of failures so far.
    retry: Option<(Instant, u32)>,
}

impl Live {
    /// Takes the file for the first time.
    ///
    /// # Errors
    /// Config: the file cannot be read or parsed. The fault of an adapter that cannot be served.
    pub fn start(file: &Path, model: Arc<Model>, bring: Bring, report: &Report) -> Result<Live> {
        let mut live = Live {
            file: file.to_owned(),
            fixed: model.names(),
            model,
            bring,
            report: report.clone(),
            served: Wanted::default(),
            text: None,
            retry: None,
        };
        let text = live.read()?;
        live.take(&text)?;
        Ok(live)
    }

    /// Follows the file in a thread of its own until the process ends.
    ///
    /// # Errors
    /// Internal: the thread cannot be started.
    pub fn follow(mut self) -> Result<()> {
        let work = move || {
            while !interrupt::requested() {
                self.look();
                std::thread::sleep(LOOK_INTERVAL);
            }
        };
        let started = std::thread::Builder::new().name("adapters".into()).spawn(work);
        started.map(|_| ()).map_err(|error| Fault::machine("start a thread", &error))
    }

    fn look(&mut self) {
        // While a mount changes the file may be away for a moment; the next look finds it.
        let Ok(text) = self.read() else { return };
        let again = self.retry.is_some_and(|(at, _)| Instant::now() >= at);
        if self.text.as_ref() == Some(&text) && !again {
            return;
        }
        let failures = self.retry.take().filter(|_| again).map_or(0, |(_, failures)| failures) + 1;
        let before = self.model.named.file().and_then(|file| file.refused);
        if let Err(fault) = self.take(&text) {
            let told = fault.in_a_line();
            if before.as_ref() != Some(&told) {
                let told = format!("{}: {told}; the server keeps its earlier adapters", self.file.display());
                self.report.warn(Stage::Load, told);
            }
            self.retry = Some((Instant::now() + backoff::pause(RETRY, RETRY_MAX, failures), failures));
        }
    }

    fn read(&self) -> Result<String> {
        use std::io::Read;
        let cannot = |error: std::io::Error| {
            Fault::config(format!("--adapters-file {}: cannot be read: {error}", self.file.display()))
        };
        let mut text = String::new();
        let file = plain::open(&self.file).map_err(cannot)?;
        file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(cannot)?;
        match text.len() as u64 > FILE_BYTES_MAX {
            true => Err(Fault::config(format!(
                "--adapters-file {}: more than {FILE_BYTES_MAX} bytes",
                self.file.display()
            ))),
            false => Ok(text),
        }
    }

    /// Serves what the text says, or leaves everything as it is.
    fn take(&mut self, text: &str) -> Result<()> {
        self.text = Some(text.to_owned());
        let taken = self.parse(text).and_then(|wanted| self.change(wanted));
        let refused = taken.as_ref().err().map(|fault| fault.clone().in_a_line());
        self.model.named.set_file(FileState { digest: file_digest(text), refused });
        taken
    }

    /// Returns the adapters of the text, with names that differ and mixes of adapters that exist.
    fn parse(&self, text: &str) -> Result<Wanted> {
        let wrong = |why: String| {
            Fault::config(format!("--adapters-file {}: {why}", self.file.display())).help(
                "expected {\"adapters\": [{\"name\": ..., \"source\": ...}], \
                 \"mixes\": [{\"name\": ..., \"adapters\": [{\"name\": ..., \"strength\": 1.0}]}]}",
            )
        };
        let wanted: Wanted = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let mut names: BTreeSet<&str> = BTreeSet::new();
        let ids = wanted.adapters.iter().map(|a| &a.name).chain(wanted.mixes.iter().map(|mix| &mix.name));
        for name in ids {
            if !server::is_name(name) {
                return Err(wrong(format!("the name {name:?}: {}", server::NAME_RULE)));
            }
            if self.fixed.contains(name) {
                return Err(wrong(format!(
                    "the name {name:?} is used twice: a flag gave it to the base, an adapter or a mix"
                )));
            }
            if !names.insert(name) {
                return Err(wrong(format!("the name {name:?} is used twice")));
            }
        }
        let missing = |name: &&str| !names.contains(*name) && !self.fixed.iter().any(|fixed| fixed == name);
        if let Some(default) = self.model.fixed_default().filter(missing) {
            return Err(wrong(format!(
                "{default:?} is missing, which answers requests that name no model (--default)"
            )));
        }
        let mut loaded: BTreeSet<&str> =
            wanted.adapters.iter().map(|adapter| adapter.name.as_str()).collect();
        let fixed = self.fixed.iter().filter(|name| self.model.named.mix(name).is_none());
        loaded.extend(fixed.map(String::as_str).filter(|name| *name != self.model.name));
        for mix in &wanted.mixes {
            let mut parts = BTreeSet::new();
            if mix.adapters.is_empty() {
                return Err(wrong(format!("mix {}: it has no adapters", mix.name)));
            }
            for part in &mix.adapters {
                if !loaded.contains(part.name.as_str()) {
                    return Err(wrong(format!("mix {}: there is no adapter {:?}", mix.name, part.name)));
                }
                if !parts.insert(&part.name) {
                    return Err(wrong(format!("mix {}: {:?} is listed twice", mix.name, part.name)));
                }
                if !STRENGTH.contains(&part.strength) {
                    return Err(wrong(format!(
                        "mix {}: strength {} of {}",
                        mix.name, part.strength, part.name
                    )));
                }
            }
        }
        Ok(wanted)
    }

    fn change(&mut self, wanted: Wanted) -> Result<()> {
        let known = |adapter: &&Adapter| !self.served.adapters.contains(adapter);
        // Everything is fetched before anything changes.
        let fetched = wanted.adapters.iter().filter(known).map(|adapter| {
            let brought = (self.bring)(&adapter.source);
            brought.map(|brought| (adapter.name.clone(), brought)).map_err(|fault| fault.at(&adapter.name))
        });
        let fetched = fetched.collect::<Result<Vec<_>>>()?;
        self.load(fetched)?;
        for mix in &wanted.mixes {
            let part = |part: &Part| Strength { name: part.name.clone(), strength: part.strength };
            self.model.named.set_mix(&mix.name, mix.adapters.iter().map(part).collect());
        }
        for old in &self.served.mixes {
            if !wanted.mixes.iter().any(|mix| mix.name == old.name) {
                self.model.named.remove_mix(&old.name);
            }
        }
        let loaded = self.model.engine.adapters();
        // A request may have removed one already.
        let there = |old: &&Adapter| loaded.iter().any(|adapter| adapter.name == old.name);
        for old in self.served.adapters.iter().filter(there) {
            if !wanted.adapters.iter().any(|adapter| adapter.name == old.name) {
                self.model.engine.unload_adapter(&old.name)?;
                self.report.note(Stage::Load, format!("Adapter removed: {}", old.name));
            }
        }
        self.served = wanted;
        Ok(())
    }

    /// Loads all, or puts back what was replaced.
    fn load(&self, fetched: Vec<(String, Brought)>) -> Result<()> {
        let origin = |name: &str| self.model.named.origin(name);
        let loaded = self.model.engine.adapters().into_iter();
        let before: BTreeMap<String, Brought> = loaded
            .map(|adapter| {
                let brought = Brought { origin: origin(&adapter.name), folder: adapter.folder };
                (adapter.name, brought)
            })
            .collect();
        let mut done: Vec<String> = Vec::new();
        for (name, brought) in fetched {
            let origin = brought.origin.clone();
            match self.model.load_adapter(&name, brought) {
                Ok(adapter) => {
                    let told = format!(
                        "Adapter added: {name} (rank {}, from {}, {})",
                        adapter.rank, origin.source, origin.digest
                    );
                    self.report.note(Stage::Load, told);
                    done.push(name);
                }
                Err(fault) => {
                    self.put_back(&done, &before);
                    return Err(fault.at(origin.source));
                }
            }
        }
        Ok(())
    }

    fn put_back(&self, names: &[String], before: &BTreeMap<String, Brought>) {
        for name in names {
            let put = match before.get(name) {
                Some(brought) => self.model.load_adapter(name, brought.clone()).map(|_| ()),
                None => self.model.engine.unload_adapter(name),
            };
            if let Err(fault) = put {
                self.report.warn(Stage::Load, format!("adapter {name}: {}", fault.in_a_line()));
            }
        }
    }
}

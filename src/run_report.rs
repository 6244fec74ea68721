//! The events of a run -> `report.json` and `timeline.jsonl` while it runs, and `report.html`, one page that
//! explains the run, at its end; `hone report` makes the page again, or one that compares several runs.
//!
//! The recorder is a sink among others: the run waits for nothing of it but a line's write. Its own failures are
//! warnings.

mod chart;
mod compare;
mod html;
mod measured;
mod page;
mod story;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};

use crate::fault::{Fault, Result};
use crate::report::{Event, Progress, Sink, Stage, StepMetrics};
use crate::run_folder::{REPORT, REPORT_FACTS, TIMELINE};
use crate::{whole, words};

pub use story::{Note, Start, Story};

/// LIMIT: notes that are kept of one start; a run has some tens.
const NOTES_MAX: usize = 400;

/// The report's own state, and the reason if it failed.
type Done = std::result::Result<(), String>;

/// A sink that passes everything on and records the facts for the page.
pub struct Recorder {
    sink: Arc<dyn Sink>,
    state: Mutex<State>,
    began: Instant,
}

struct State {
    story: Story,
    /// `None` until the run owns its folder.
    folder: Option<PathBuf>,
    timeline: Option<File>,
    sampler: crate::metrics::Sampler,
    /// The digest of the program's own file, computed beside the run's beginning.
    binary: Option<JoinHandle<Option<String>>>,
    ended: bool,
}

impl Recorder {
    /// Returns a recorder in front of `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Recorder {
        let state = State {
            story: Story::begin(now()),
            folder: None,
            timeline: None,
            sampler: crate::metrics::Sampler::default(),
            binary: None,
            ended: false,
        };
        Recorder { sink, state: Mutex::new(state), began: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Does a part of the report's work. A failure is reported once and changes nothing else.
    fn attempt(&self, doing: &str, work: impl FnOnce(&mut State) -> Done) {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&mut self.lock())));
        let why = match done {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => "see the panic message above".to_owned(),
        };
        let text = format!("the report could not be {doing}, which changes nothing else: {why}");
        self.sink.event(&Event::Warning { stage: Stage::Plan, text });
    }

    fn note(&self, stage: Stage, warning: bool, text: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        let mut state = self.lock();
        if state.story.notes.len() < NOTES_MAX {
            let text = crate::report::clean::without_secrets(text);
            state.story.notes.push(Note { seconds, stage: stage.name().into(), warning, text });
        }
    }

    fn fact(&self, name: &str, value: &Json) {
        match name {
            "folder" => self.attempt("begun", |state| state.open(value)),
            "ended" => self.attempt("written", |state| state.end(None)),
            _ => {
                self.lock().story.facts.insert(name.into(), value.clone());
            }
        }
        // The story is written before the long part, so that a run that is killed leaves it.
        if name == "memory plan" {
            self.attempt("kept", |state| state.keep());
        }
    }

    fn step(&self, metrics: &StepMetrics) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.attempt("kept up to date", |state| {
            let Some(file) = &mut state.timeline else { return Ok(()) };
            let line = json!({
                "step": metrics.step, "seconds": (seconds * 1e3).round() / 1e3,
                "tokens_per_second": metrics.tokens_per_second.round(), "memory_bytes": state.sampler.memory_used(),
            });
            let written = file.write_all(format!("{line}\n").as_bytes());
            if written.is_err() {
                state.timeline = None; // reported once
            }
            written.map_err(|error| error.to_string())
        });
    }
}

impl Sink for Recorder {
    fn event(&self, event: &Event) {
        match event {
            Event::Note { stage, text } => self.note(*stage, false, text),
            Event::Warning { stage, text } => self.note(*stage, true, text),
            Event::Step(metrics) => self.step(metrics),
            Event::Evaluated { .. } => {}
            Event::Fact { name, value } => self.fact(name, value),
            Event::Failed(fault) => self.attempt("written", |state| state.end(Some(fault))),
        }
        self.sink.event(event);
    }

    fn progress(&self, progress: &Progress) {
        self.sink.progress(progress);
    }
}

impl State {
    /// Opens the run's folder, and continues the records that an earlier start of the same run left there.
    fn open(&mut self, told: &Json) -> Done {
        let Some(folder) = told["path"].as_str().map(PathBuf::from) else { return Ok(()) };
        self.story.facts.insert("fingerprint".into(), told["fingerprint"].clone());
        // A story that cannot be read now is begun again: a report stops no run.
        if let Ok(Some(earlier)) = Story::read(&folder)
            && earlier.facts.get("fingerprint") == self.story.facts.get("fingerprint")
        {
            self.story.continues(earlier);
        }
        self.binary = std::thread::Builder::new().name("hash".into()).spawn(binary_digest).ok();
        let timeline = folder.join(TIMELINE);
        self.folder = Some(folder);
        self.keep()?;
        let mut open = OpenOptions::new();
        // A pipe that somebody planted has no reader, so that it is refused at once.
        open.append(true).create(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        self.timeline = Some(open.open(timeline).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn keep(&self) -> Done {
        let Some(folder) = &self.folder else { return Ok(()) };
        let story = Story { hone: env!("CARGO_PKG_VERSION").into(), ..self.story.clone() };
        let text = serde_json::to_vec_pretty(&story).expect("texts and numbers");
        whole::write(&folder.join(REPORT_FACTS), &text).map_err(Fault::in_a_line)
    }

    /// Writes the facts and the page at the end of this start.
    fn end(&mut self, fault: Option<&Fault>) -> Done {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        if let Some(digest) = self.binary.take().and_then(|thread| thread.join().ok()).flatten() {
            self.story.facts.insert("binary_sha256".into(), digest.into());
        }
        self.story.end(now(), fault);
        self.keep()?;
        let run = page::Run::of(&folder, self.story.clone());
        whole::write(&folder.join(REPORT), page::html(&run).as_bytes()).map_err(Fault::in_a_line)?;
        run.unread.map_or(Ok(()), |fault| Err(fault.in_a_line()))
    }
}

fn binary_digest() -> Option<String> {
    let mut file = File::open("/proc/self/exe").ok()?;
    let mut hash = <sha2::Sha256 as sha2::Digest>::new();
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part).ok()? {
            0 => break,
            count => sha2::Digest::update(&mut hash, &part[..count]),
        }
    }
    Some(words::hex(sha2::Digest::finalize(hash)))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Makes the page of one folder of results, or one that compares several, and writes it: into `to`, else as
/// `report.html` of the one folder, or as `comparison.html` here. Returns its path.
///
/// # Errors
/// Usage: a folder that holds no results of a run. Config: the folder of `to` is not there. Storage: a file cannot be
/// read, or the page not be written.
pub fn make(folders: &[PathBuf], to: Option<&Path>) -> Result<PathBuf> {
    let runs: Vec<page::Run> = folders.iter().map(|folder| read(folder)).collect::<Result<_>>()?;
    let (page, default) = match (runs.as_slice(), folders) {
        ([run], [folder]) => (page::html(run), folder.join(REPORT)),
        _ => (compare::html(&runs), PathBuf::from("comparison.html")),
    };
    match to {
        Some(place) => whole::write_named(place, page.as_bytes()).map(|()| place.to_owned()),
        None => whole::write(&default, page.as_bytes()).map(|()| default),
    }
}

fn read(folder: &Path) -> Result<page::Run> {
    let mut run = page::Run::of(folder, Story::read(folder)?.unwrap_or_default());
    if let Some(fault) = run.unread.take() {
        return Err(fault);
    }
    match run.is_empty() {
        false => Ok(run),
        true => Err(Fault::usage(format!(
            "{} holds no results of a run: none of {REPORT_FACTS}, hone.json and metrics.jsonl",
            folder.display()
        ))
        .help("name the output folder of `hone run`")),
    }
}

#[cfg(test)]
mod tests;

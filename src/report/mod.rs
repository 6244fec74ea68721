//! What a run tells the outside: events and progress, to a terminal or as JSON lines.
//!
//! Code that works holds a `Report` and speaks in events; only the sinks know how they look.

pub mod clean;
pub mod terminal;
pub mod lines;
pub mod termination;

use std::io::IsTerminal;
use std::sync::{Arc, Mutex};

use crate::fault::Fault;

/// The part of a job that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Plan,
    Download,
    Read,
    Tokenize,
    Load,
    Train,
    Evaluate,
    Push,
    Pull,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Stage::Plan => "plan",
            Stage::Download => "download",
            Stage::Read => "read",
            Stage::Tokenize => "tokenize",
            Stage::Load => "load",
            Stage::Train => "train",
            Stage::Evaluate => "evaluate",
            Stage::Push => "push",
            Stage::Pull => "pull",
        }
    }
}

/// What a stage's progress counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Rows,
    Tensors,
    Steps,
}

/// One logged optimizer step; names as TRL logs them.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct StepMetrics {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub epoch: f64,
    pub num_tokens: u64,
    pub tokens_per_second: f64,
    pub eta_seconds: f64,
}

/// Something that happened, once.
#[derive(Clone, Debug)]
pub enum Event {
    /// A fact worth a line: a file verified, a row count, a digest.
    Note {
        stage: Stage,
        text: String,
    },
    /// Something a person should look at although the run goes on.
    Warning {
        stage: Stage,
        text: String,
    },
    Step(StepMetrics),
    Evaluated {
        step: u64,
        epoch: f64,
        eval_loss: f64,
        /// Share of the supervised tokens that are the most probable ones, if it was counted.
        accuracy: Option<f64>,
    },
    /// Something about the run that is kept for its report, under a name; terminals and logs pass it over.
    Fact {
        name: &'static str,
        value: serde_json::Value,
    },
    /// The end of a run that did not reach its own.
    Failed(Fault),
}

/// Where events and progress go.
pub trait Sink: Send + Sync {
    fn event(&self, event: &Event);
    /// A task began, moved or (`done == total`, or `finished`) ended. `label` is a file name or the like.
    fn progress(&self, progress: &Progress);
}

/// Whether `choose` takes JSON lines.
pub fn is_json(bars: Option<bool>) -> bool {
    !bars.unwrap_or_else(|| std::io::stderr().is_terminal())
}

/// Bars when `bars` says so, or, when it says nothing, when stderr is a terminal; JSON lines otherwise.
pub fn choose(bars: Option<bool>, quiet: bool) -> Arc<dyn Sink> {
    if !is_json(bars) {
        return Arc::new(terminal::Terminal::new(quiet));
    }
    let lines = lines::Lines::new(quiet);
    lines.install();
    Arc::new(lines)
}

#[derive(Clone, Debug)]
pub struct Progress {
    /// Distinguishes tasks that run at the same time.
    pub id: u64,
    pub stage: Stage,
    pub unit: Unit,
    pub label: String,
    pub done: u64,
    pub total: Option<u64>,
    pub finished: bool,
}

/// A cheap handle that any thread may hold.
#[derive(Clone)]
pub struct Report {
    sink: Arc<dyn Sink>,
    next_id: Arc<std::sync::atomic::AtomicU64>,
}

impl Report {
    pub fn new(sink: Arc<dyn Sink>) -> Report {
        Report { sink, next_id: Arc::default() }
    }

    /// Where this report's events go, for a sink that stands in front of it.
    pub fn sink(&self) -> Arc<dyn Sink> {
        self.sink.clone()
    }

    /// Says nothing; for tests and library use.
    pub fn silent() -> Report {
        Report::new(Arc::new(Silent))
    }

    pub fn say(&self, event: Event) {
        self.sink.event(&event);
    }

    pub fn note(&self, stage: Stage, text: impl Into<String>) {
        self.say(Event::Note { stage, text: text.into() });
    }

    /// Keeps a fact for the run's report.
    pub fn fact(&self, name: &'static str, value: impl Into<serde_json::Value>) {
        self.say(Event::Fact { name, value: value.into() });
    }

    pub fn fault(&self, fault: &Fault) {
        self.say(Event::Failed(fault.clone()));
    }

    pub fn warn(&self, stage: Stage, text: impl Into<String>) {
        self.say(Event::Warning { stage, text: text.into() });
    }

    /// Starts a task; it ends when the returned value is dropped.
    pub fn task(&self, stage: Stage, unit: Unit, label: impl Into<String>, total: Option<u64>) -> Task {
        let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let progress = Progress { id, stage, unit, label: label.into(), done: 0, total, finished: false };
        self.sink.progress(&progress);
        Task { sink: self.sink.clone(), progress: Mutex::new(progress) }
    }
}

/// A running task with its progress.
pub struct Task {
    sink: Arc<dyn Sink>,
    progress: Mutex<Progress>,
}

impl Task {
    pub fn advance(&self, by: u64) {
        self.change(|progress| progress.done += by);
    }

    /// Sets the absolute position (a resumed download starts above zero).
    pub fn set(&self, done: u64) {
        self.change(|progress| progress.done = done);
    }

    pub fn set_total(&self, total: u64) {
        self.change(|progress| progress.total = Some(total));
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = self.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        change(&mut progress);
        self.sink.progress(&progress);
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.change(|progress| progress.finished = true);
    }
}

struct Silent;

impl Sink for Silent {
    fn event(&self, _: &Event) {}
    fn progress(&self, _: &Progress) {}
}

//! Reports what a run does: events and progress, to a terminal or as JSON lines.
//!
//! Working code holds a `Report` and reports events; only the sinks know how events are shown.

pub mod clean;
pub mod terminal;
pub mod lines;
pub mod termination;

use std::io::IsTerminal;
use std::sync::{Arc, Mutex};

use crate::fault::Fault;

/// The part of a job that is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the settings and deciding what to do.
    Plan,
    /// Fetching data or a model.
    Download,
    /// Reading rows from files.
    Read,
    /// Turning rows into token examples.
    Tokenize,
    /// Reading a model's weights.
    Load,
    /// Optimizer steps.
    Train,
    /// Computing the loss on the evaluation examples.
    Evaluate,
    /// Uploading an image to a registry.
    Push,
    /// Downloading an image from a registry.
    Pull,
}

impl Stage {
    /// Returns the name of the stage in logs and metrics.
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

/// The unit of a stage's progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of a file.
    Bytes,
    /// Rows of a dataset.
    Rows,
    /// Tensors of a model.
    Tensors,
    /// Optimizer steps or evaluation batches.
    Steps,
}

/// Figures of a logged optimizer step, under the names that TRL logs.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean of the steps' losses since the step logged before. A step's loss is the mean over its target tokens.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Passes over the data so far, with a fraction.
    pub epoch: f64,
    /// Tokens trained so far, including earlier processes of a resumed run.
    pub num_tokens: u64,
    /// Tokens that this process trained in a second.
    pub tokens_per_second: f64,
    /// Estimated time to the end of training.
    pub eta_seconds: f64,
}

/// Something that happened once.
#[derive(Clone, Debug)]
pub enum Event {
    /// A fact worth a line: a file verified, a row count, a digest.
    Note {
        /// Stage that the fact belongs to.
        stage: Stage,
        /// The fact.
        text: String,
    },
    /// Something that a person should look at, although the run continues.
    Warning {
        /// Stage that the warning belongs to.
        stage: Stage,
        /// The warning.
        text: String,
    },
    /// An optimizer step whose figures are logged.
    Step(StepMetrics),
    /// An evaluation ended.
    Evaluated {
        /// Number of the step after which it was made.
        step: u64,
        /// Passes over the data so far, with a fraction.
        epoch: f64,
        /// Loss on the evaluation examples.
        eval_loss: f64,
        /// Share of the supervised tokens that are the most probable ones.
        accuracy: f64,
        /// `eval_NAME_loss` and `eval_NAME_mean_token_accuracy` of each source, if there are several.
        sources: Vec<(String, f64)>,
    },
    /// Something about the run that is kept for its report, under a name; terminals and logs pass it over.
    Fact {
        /// Name in `report.json`.
        name: &'static str,
        /// The facts that are known.
        value: serde_json::Value,
    },
    /// The run failed.
    Failed(Fault),
}

/// The sinks of events and progress.
pub trait Sink: Send + Sync {
    /// Takes an event.
    fn event(&self, event: &Event);
    /// Takes the state of a task that began, moved or ended (`done == total`, or `finished`).
    fn progress(&self, progress: &Progress);
}

/// Returns whether `choose` writes JSON lines.
pub fn is_json(bars: Option<bool>) -> bool {
    !bars.unwrap_or_else(|| std::io::stderr().is_terminal())
}

/// Returns whether text on this stream may have colours: it is a terminal that shows them, and the user does not refuse
/// them with `NO_COLOR` (no-color.org).
pub fn has_colours(stream: &impl IsTerminal) -> bool {
    shows_colours(stream.is_terminal(), &environment)
}

fn shows_colours(is_terminal: bool, variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let is_refused = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    is_terminal && !is_refused && !is_dumb(variable)
}

/// Returns whether the terminal has neither colours nor a cursor that moves, such as a shell inside of an editor.
fn is_dumb(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    variable("TERM").is_some_and(|kind| kind == "dumb")
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Returns a sink that shows bars, or one that writes JSON lines. Bars are shown if `bars` is true; if `bars` is
/// `None`, they are shown if stderr is a terminal.
pub fn choose(bars: Option<bool>, quiet: bool) -> Arc<dyn Sink> {
    if !is_json(bars) {
        return Arc::new(terminal::Terminal::new(quiet));
    }
    let lines = lines::Lines::new(quiet);
    lines.install();
    Arc::new(lines)
}

/// State of a task.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Distinguishes tasks that run at the same time.
    pub id: u64,
    /// Stage that the task belongs to.
    pub stage: Stage,
    /// The unit of `done` and `total`.
    pub unit: Unit,
    /// A file name or similar.
    pub label: String,
    /// Units done so far.
    pub done: u64,
    /// Units in all; `None` if that is not known.
    pub total: Option<u64>,
    /// Whether the task ended.
    pub finished: bool,
}

/// A handle for reporting events; it is cheap to clone, and any thread may hold one.
#[derive(Clone)]
pub struct Report {
    sink: Arc<dyn Sink>,
    next_id: Arc<std::sync::atomic::AtomicU64>,
}

impl Report {
    /// Returns a report that passes everything to `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Report {
        Report { sink, next_id: Arc::default() }
    }

    /// Returns the sinks of this report's events, for a sink that stands in front of it.
    pub fn sink(&self) -> Arc<dyn Sink> {
        self.sink.clone()
    }

    /// Returns a report that discards everything, for tests and library use.
    pub fn silent() -> Report {
        Report::new(Arc::new(Silent))
    }

    /// Reports an event.
    pub fn say(&self, event: Event) {
        self.sink.event(&event);
    }

    /// Reports a fact worth a line.
    pub fn note(&self, stage: Stage, text: impl Into<String>) {
        self.say(Event::Note { stage, text: text.into() });
    }

    /// Keeps a fact for the run's report.
    pub fn fact(&self, name: &'static str, value: impl Into<serde_json::Value>) {
        self.say(Event::Fact { name, value: value.into() });
    }

    /// Reports that the run failed.
    pub fn fault(&self, fault: &Fault) {
        self.say(Event::Failed(fault.clone()));
    }

    /// Reports a warning.
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
    /// Adds to the units done.
    pub fn advance(&self, by: u64) {
        self.change(|progress| progress.done += by);
    }

    /// Sets the absolute position (a resumed download starts above zero).
    pub fn set(&self, done: u64) {
        self.change(|progress| progress.done = done);
    }

    /// Sets the number of units in all, when it becomes known.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        let shows = |is_terminal: bool, name: &str, value: &str| {
            shows_colours(is_terminal, &|asked| (asked == name).then(|| value.to_owned()))
        };
        assert!(shows(true, "TERM", "xterm"));
        assert!(shows(true, "NO_COLOR", ""), "an empty value refuses nothing");
        assert!(!shows(true, "NO_COLOR", "1"));
        assert!(!shows(true, "TERM", "dumb"));
        assert!(!shows(false, "TERM", "xterm"));
    }
}

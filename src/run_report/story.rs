//! `report.json`: the facts of a run, its notes, and the end of each of its starts.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::fault::{Fault, Kind, Result};
use crate::run_folder::REPORT_FACTS;

/// LIMIT: facts and notes of a run are tens of kilobytes.
const STORY_BYTES_MAX: u64 = 16 << 20;
/// LIMIT: starts that are remembered; a job that is evicted often has some tens.
const STARTS_MAX: usize = 100;

/// Everything that is recorded of a run beside its metrics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Story {
    /// Version of hone that wrote the file. It comes first: hone knows its own file by it (`REPORT_FACTS_MARK`).
    pub hone: String,
    /// The facts by name: plan, model, data, memory plan and so on, as the stages reported them.
    pub facts: Map<String, Json>,
    /// The facts of the newest start.
    pub notes: Vec<Note>,
    /// Oldest first; the last is the newest.
    pub starts: Vec<Start>,
}

/// A note or a warning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Note {
    /// Since the start.
    pub seconds: f64,
    /// Name of the stage.
    pub stage: String,
    /// Whether it is a warning.
    pub warning: bool,
    /// The message.
    pub text: String,
}

/// One start of the process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Start {
    /// Seconds since 1970.
    pub began: u64,
    /// `None`: it still runs, or it was killed.
    pub ended: Option<u64>,
    /// `None`: it reached its end, or no end was recorded.
    pub fault: Option<Failure>,
}

/// The reason why a start failed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// Name of the kind of fault.
    pub kind: String,
    /// The process's exit code.
    pub exit_code: u8,
    /// The meaning of the kind.
    pub meaning: String,
    /// The event.
    pub message: String,
    /// The remedy.
    pub help: Option<String>,
    /// Whether the same run can succeed if it is started again.
    pub retry_helps: bool,
}

/// Returns the text of a plain file that is not too large. Any other file counts as absent.
///
/// # Errors
/// Storage: the machine failed to read it.
pub(super) fn plain_text(file: &Path, bytes_max: u64) -> Result<Option<String>> {
    match crate::plain::read(file, bytes_max) {
        Ok(bytes) => Ok(String::from_utf8(bytes).ok()),
        Err(error) => machines(file, &error).map_or(Ok(None), Err),
    }
}

/// Returns the fault for a file that the machine failed to read; `None` if the file is absent or not a plain file.
pub(super) fn machines(file: &Path, error: &std::io::Error) -> Option<Fault> {
    let fault = Fault::unread(Kind::Usage, format!("cannot read {}: {error}", file.display()), error);
    (fault.kind == Kind::Storage).then_some(fault)
}

impl Story {
    /// Returns a story that begins with a process that was started then.
    pub fn begin(began: u64) -> Story {
        Story { starts: vec![Start { began, ..Start::default() }], ..Story::default() }
    }

    /// Returns the report of a folder; `None` if there is none, or none of hone's.
    ///
    /// # Errors
    /// Storage: the machine failed to read it.
    pub fn read(folder: &Path) -> Result<Option<Story>> {
        let text = plain_text(&folder.join(REPORT_FACTS), STORY_BYTES_MAX)?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Adds the newest start to those of an earlier story. Facts of this start replace earlier ones.
    pub fn continues(&mut self, earlier: Story) {
        let mut facts = earlier.facts;
        facts.extend(std::mem::take(&mut self.facts));
        self.facts = facts;
        let mut starts = earlier.starts;
        starts.append(&mut self.starts);
        let surplus = starts.len().saturating_sub(STARTS_MAX);
        self.starts = starts.split_off(surplus);
    }

    /// Records the end of the newest start.
    pub fn end(&mut self, now: u64, fault: Option<&Fault>) {
        let Some(start) = self.starts.last_mut() else { return };
        start.ended = Some(now);
        let clean = |text: &str| crate::report::clean::without_secrets(text);
        start.fault = fault.map(|fault| Failure {
            kind: fault.kind.name().into(),
            exit_code: fault.kind.exit_code(),
            meaning: fault.kind.meaning().into(),
            message: clean(&fault.message),
            help: fault.help.as_deref().map(clean),
            retry_helps: fault.kind.retry_helps(),
        });
    }

    /// Returns the newest start.
    pub fn last(&self) -> Option<&Start> {
        self.starts.last()
    }
}

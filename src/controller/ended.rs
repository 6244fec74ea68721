//! The end of a container, as the kubelet reports it -> its exit code and hone's termination message, and both in
//! words.

use k8s_openapi::api::core::v1::ContainerStateTerminated;
use serde::Deserialize;

use crate::fault::Kind;

/// The end of a container, with hone's termination message if there is one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ended {
    /// The index of its pod, if the Job has several.
    pub pod: Option<usize>,
    /// Exit code of the process; 128 and the signal's number if a signal ended it.
    pub exit_code: i32,
    /// The kubelet's reason, such as `OOMKilled`.
    pub reason: String,
    /// The termination message; empty if there is none.
    pub said: Said,
}

/// The termination message, as `report::termination` writes it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Said {
    /// Name of the fault's kind; `ok` after success.
    pub kind: String,
    /// The error message.
    pub message: Option<String>,
    /// The remedy that the fault names.
    pub help: Option<String>,
    /// The last logged optimizer step.
    pub step: Option<u64>,
    /// Loss of that step.
    pub loss: Option<f64>,
    /// Loss of the newest evaluation.
    pub eval_loss: Option<f64>,
    /// The pushed image with its tag.
    pub image: Option<String>,
    /// Digest of the pushed image.
    pub digest: Option<String>,
}

impl Ended {
    /// Returns the end as the kubelet reports it.
    pub fn of(state: &ContainerStateTerminated) -> Ended {
        let text = state.message.as_deref().unwrap_or_default();
        // With FallbackToLogsOnError the message may be the end of the log, whose lines are JSON too, but of no kind.
        let said = text.lines().rev().filter_map(|line| serde_json::from_str::<Said>(line.trim()).ok());
        let said = said.into_iter().find(|said| !said.kind.is_empty());
        Ended {
            pod: None,
            exit_code: state.exit_code,
            reason: state.reason.clone().unwrap_or_default(),
            said: said.unwrap_or_default(),
        }
    }

    /// Returns `exit code 11 (data): row 3 ...; REMEDY`, on several nodes preceded by the pod.
    pub fn told(&self) -> String {
        match self.pod {
            Some(index) => format!("pod {index}: {}", self.told_of_container()),
            None => self.told_of_container(),
        }
    }

    fn told_of_container(&self) -> String {
        let kind = Kind::ALL.into_iter().find(|kind| i32::from(kind.exit_code()) == self.exit_code);
        let name = kind.map_or(self.reason.as_str(), |kind| kind.name());
        let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
        let parts = [self.said.message.as_deref(), self.said.help.as_deref()];
        let words: Vec<&str> = parts.into_iter().flatten().collect();
        match (words.is_empty(), self.exit_code) {
            (false, code) => format!("exit code {code}{name}: {}", words.join("; ")),
            (true, 137) if self.reason == "OOMKilled" => {
                format!("exit code 137{name}: killed for its memory; raise hone.sh/memory")
            }
            (true, 137) => format!("exit code 137{name}: killed from outside, by a person or by its node"),
            (true, code) => format!("exit code {code}{name}"),
        }
    }
}

//! Events of a rank that is not the first -> the few that only this rank knows.
//!
//! Rank 0 reports the run. Events that follow from the keys, the data or the numbers of training are the same on every
//! rank. So another rank shows only warnings of its machine, and a fault that rank 0 does not know.

use std::sync::Arc;

use crate::fault::Fault;
use crate::report::{Event, Progress, Sink, Stage};

/// The sink of a rank that is not the first.
pub struct Follower {
    inner: Arc<dyn Sink>,
    rank: usize,
    /// Whether rank 0 knows why this rank ends.
    is_told: fn() -> bool,
}

impl Follower {
    /// Returns a sink that passes events that only this rank knows to `inner`, with the rank's number. `is_told` says
    /// whether rank 0 knows why this rank ends (`link::is_told`).
    pub fn new(inner: Arc<dyn Sink>, rank: usize, is_told: fn() -> bool) -> Follower {
        Follower { inner, rank, is_told }
    }

    fn named(&self, text: &str) -> String {
        format!("rank {}: {text}", self.rank)
    }
}

impl Sink for Follower {
    fn event(&self, event: &Event) {
        let shown = match event {
            Event::Warning { stage: stage @ (Stage::Download | Stage::Load), text } => {
                Event::Warning { stage: *stage, text: self.named(text) }
            }
            Event::Failed(fault) if !(self.is_told)() => {
                Event::Failed(Fault { message: self.named(&fault.message), ..fault.clone() })
            }
            _ => return,
        };
        self.inner.event(&shown);
    }

    fn progress(&self, _: &Progress) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Sink for Heard {
        fn event(&self, event: &Event) {
            self.0.lock().unwrap().push(format!("{event:?}"));
        }
        fn progress(&self, progress: &Progress) {
            self.0.lock().unwrap().push(progress.label.clone());
        }
    }

    #[test]
    fn only_what_this_rank_knows_is_shown() {
        let heard = Arc::new(Heard::default());
        let report = Report::new(Arc::new(Follower::new(heard.clone(), 2, || false)));
        report.note(Stage::Train, "a note");
        report.warn(Stage::Plan, "of the keys");
        drop(report.task(Stage::Load, crate::report::Unit::Tensors, "tensors", None));
        report.warn(Stage::Download, "a slow mirror");
        report.fault(&Fault::data("no rows"));
        Report::new(Arc::new(Follower::new(heard.clone(), 1, || true))).fault(&Fault::data("rank 0 says it"));
        let heard = heard.0.lock().unwrap();
        assert_eq!(heard.len(), 2, "{heard:?}");
        assert!(
            heard[0].contains("rank 2: a slow mirror") && heard[1].contains("rank 2: no rows"),
            "{heard:?}"
        );
    }
}

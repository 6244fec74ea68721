//! The end of a pod's log -> the progress of its training. The log consists of hone's JSON lines (`report::lines`).

use serde::Deserialize;

/// Lines that are read. The newest step is among them: a step is logged every `logging_steps`, a task every 10 s.
pub const LINES: i64 = 40;

/// The last logged step and the number of steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Optimizer step that was logged last.
    pub step: u64,
    /// Steps of the whole run, if the log shows them.
    pub total: Option<u64>,
    /// Loss of the last logged step.
    pub loss: f64,
    /// Expected seconds to the end of training.
    pub eta_seconds: f64,
}

#[derive(Deserialize)]
struct Line {
    step: Option<u64>,
    loss: Option<f64>,
    eta_seconds: Option<f64>,
    unit: Option<String>,
    total: Option<u64>,
}

impl Progress {
    /// Reads the end of a log. `None`: no line in it reports a step.
    pub fn parse(log: &str) -> Option<Progress> {
        let lines: Vec<Line> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let last = |line: &Line| Some((line.step?, line.loss?, line.eta_seconds?));
        let (step, loss, eta_seconds) = lines.iter().rev().find_map(last)?;
        let steps = lines.iter().rev().filter(|line| line.unit.as_deref() == Some("steps"));
        Some(Progress { step, total: steps.filter_map(|line| line.total).next(), loss, eta_seconds })
    }

    /// Returns `120 of 500`, or `120`.
    pub fn steps(&self) -> String {
        match self.total {
            Some(total) => format!("{} of {total}", self.step),
            None => self.step.to_string(),
        }
    }

    /// Returns a text such as `1h5m`, `3m20s` or `8s`.
    pub fn eta(&self) -> String {
        let seconds = self.eta_seconds.max(0.0).round() as u64;
        match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
            (0, 0, seconds) => format!("{seconds}s"),
            (0, minutes, seconds) => format!("{minutes}m{seconds}s"),
            (hours, minutes, _) => format!("{hours}h{minutes}m"),
        }
    }

    /// Returns the progress as part of a sentence: step, loss and remaining time.
    pub fn told(&self) -> String {
        format!("step {}, loss {:.4}, {} left", self.steps(), self.loss, self.eta())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{self, Event, Report, Sink, StepMetrics, Unit};
    use std::sync::{Arc, Mutex};

    /// A log as the pod writes it, through the sink that writes it.
    #[test]
    fn a_jobs_own_log_is_understood() {
        #[derive(Clone, Default)]
        struct Paper(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Paper {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let paper = Paper::default();
        let writer = paper.clone();
        let lines: Arc<dyn Sink> = Arc::new(report::lines::Lines::to(move || writer.clone()));
        let report = Report::new(lines);
        let task = report.task(report::Stage::Train, Unit::Steps, "steps", Some(500));
        task.set(110);
        task.set(111);
        for step in [110, 120] {
            report.say(Event::Step(StepMetrics {
                step,
                loss: 200.0 / step as f64,
                grad_norm: 1.0,
                learning_rate: 1e-4,
                epoch: 0.5,
                num_tokens: 9,
                tokens_per_second: 10.0,
                eta_seconds: 3900.0,
            }));
        }
        drop(task);
        let log = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        let progress = Progress::parse(&format!("half a line\"}}\n{log}warning: words\n")).unwrap();
        assert_eq!((progress.step, progress.eta().as_str()), (120, "1h5m"));
        assert_eq!(progress.told(), format!("step {}, loss 1.6667, 1h5m left", progress.steps()));
        assert_eq!(Progress::parse("no step yet\n{\"stage\":\"load\"}"), None);
    }
}

//! Events and progress -> one JSON line each, through tracing, so that warnings of libraries appear in the same log.

use super::clean::clean;
use super::{Event, Progress, Sink, Unit};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tracing::Dispatch;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Shortest time between two progress lines of a task: logs are read by machines and stored.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
const TEXT_CHARACTERS_MAX: usize = 4000;
/// The filter is fixed; `RUST_LOG` does not change it. Below `info`, HTTP libraries print headers and addresses with
/// secrets.
const FILTER: &str = "warn,hone=info";
const FILTER_QUIET: &str = "warn";

/// Writes events and progress as JSON lines.
pub struct Lines {
    dispatch: Dispatch,
    interval: Duration,
    /// The time of each running task's last line.
    spoke: Mutex<HashMap<u64, Instant>>,
}

impl Lines {
    /// Writes to stderr. `quiet`: only warnings are written.
    pub fn new(quiet: bool) -> Lines {
        Lines::on(std::io::stderr, quiet, PROGRESS_INTERVAL)
    }

    /// Writes to another writer, a line for each change of a task.
    #[cfg(test)]
    pub fn to<W>(writer: W) -> Lines
    where
        W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    {
        Lines::on(writer, false, Duration::ZERO)
    }

    fn on<W>(writer: W, quiet: bool, interval: Duration) -> Lines
    where
        W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    {
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_target(false)
            .with_current_span(false)
            .with_span_list(false)
            // tracing would report a log that cannot be written to the same log, and panic there.
            .log_internal_errors(false)
            .with_env_filter(EnvFilter::new(if quiet { FILTER_QUIET } else { FILTER }))
            .with_writer(writer)
            .finish();
        Lines { dispatch: Dispatch::new(subscriber), interval, spoke: Mutex::default() }
    }

    /// Receives the events that libraries log through tracing, too. The first call in a process counts; later calls
    /// change nothing.
    pub fn install(&self) {
        let _ = tracing::dispatcher::set_global_default(self.dispatch.clone());
    }

    /// Returns whether a task may write a line now. Its first line comes one interval after its start.
    fn may_speak(&self, progress: &Progress) -> bool {
        let mut spoke = self.spoke.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if progress.finished {
            return spoke.remove(&progress.id).is_some();
        }
        let now = Instant::now();
        let Some(last) = spoke.get_mut(&progress.id) else {
            spoke.insert(progress.id, now);
            return false;
        };
        let due = now.duration_since(*last) >= self.interval;
        if due {
            *last = now;
        }
        due
    }
}

impl Sink for Lines {
    fn event(&self, event: &Event) {
        tracing::dispatcher::with_default(&self.dispatch, || speak(event));
    }

    fn progress(&self, progress: &Progress) {
        if self.may_speak(progress) {
            tracing::dispatcher::with_default(&self.dispatch, || speak_of_progress(progress));
        }
    }
}

fn speak(event: &Event) {
    match event {
        Event::Note { stage, text } => {
            tracing::info!(target: "hone", stage = stage.name(), "{}", clean(text, TEXT_CHARACTERS_MAX));
        }
        Event::Warning { stage, text } => {
            tracing::warn!(target: "hone", stage = stage.name(), "{}", clean(text, TEXT_CHARACTERS_MAX));
        }
        Event::Step(metrics) => tracing::info!(
            target: "hone",
            stage = "train",
            step = metrics.step,
            loss = metrics.loss,
            grad_norm = metrics.grad_norm,
            learning_rate = metrics.learning_rate,
            epoch = metrics.epoch,
            num_tokens = metrics.num_tokens,
            tokens_per_second = metrics.tokens_per_second,
            eta_seconds = metrics.eta_seconds,
            "step"
        ),
        Event::Evaluated { step, epoch, eval_loss, accuracy, sources } => {
            tracing::info!(
                target: "hone", stage = "evaluate", step, epoch, eval_loss, eval_mean_token_accuracy = accuracy, "evaluated"
            );
            for (metric, value) in sources {
                tracing::info!(target: "hone", stage = "evaluate", step, metric = metric.as_str(), value, "evaluated a source");
            }
        }
        Event::Fact { .. } => {}
        Event::Failed(fault) => tracing::error!(
            target: "hone",
            kind = fault.kind.name(),
            exit_code = fault.kind.exit_code(),
            help = fault.help.as_deref().map(|help| clean(help, TEXT_CHARACTERS_MAX)),
            "{}",
            clean(&fault.message, TEXT_CHARACTERS_MAX)
        ),
    }
}

fn speak_of_progress(progress: &Progress) {
    let unit = match progress.unit {
        Unit::Bytes => "bytes",
        Unit::Rows => "rows",
        Unit::Tensors => "tensors",
        Unit::Steps => "steps",
    };
    let label = clean(&progress.label, TEXT_CHARACTERS_MAX);
    let message = if progress.finished { "ended" } else { "progress" };
    let (stage, done, total) = (progress.stage.name(), progress.done, progress.total);
    tracing::info!(target: "hone", stage, label, unit, done, total, "{message}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, Stage, StepMetrics};
    use serde_json::Value;
    use std::io::Write;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Returns the lines that `work` writes, each parsed.
    fn lines(quiet: bool, interval: Duration, work: impl FnOnce(&Report)) -> Vec<Value> {
        let paper = Paper::default();
        let writer = paper.clone();
        work(&Report::new(Arc::new(Lines::on(move || writer.clone(), quiet, interval))));
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn an_event_is_a_line_with_time_level_stage_and_fields() {
        let lines = lines(false, PROGRESS_INTERVAL, |report| {
            report.note(Stage::Download, "first\nsecond \u{1b}[31m");
            report.warn(Stage::Read, "careful");
            report.say(Event::Step(StepMetrics {
                step: 7,
                loss: 1.5,
                grad_norm: 0.25,
                learning_rate: 2e-5,
                epoch: 0.5,
                num_tokens: 99,
                tokens_per_second: 10.0,
                eta_seconds: 3.0,
            }));
            report.say(Event::Evaluated {
                step: 7,
                epoch: 0.5,
                eval_loss: 2.5,
                accuracy: 0.5,
                sources: Vec::new(),
            });
        });
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line["timestamp"].as_str().unwrap().contains('T')));
        assert_eq!((&lines[0]["level"], &lines[0]["stage"]), (&"INFO".into(), &"download".into()));
        assert_eq!(lines[0]["message"], "first\\nsecond \\u{1b}[31m");
        assert_eq!((&lines[1]["level"], &lines[1]["message"]), (&"WARN".into(), &"careful".into()));
        assert_eq!(
            (&lines[2]["step"], &lines[2]["loss"], &lines[2]["num_tokens"]),
            (&7.into(), &1.5.into(), &99.into())
        );
        assert_eq!((&lines[3]["stage"], &lines[3]["eval_loss"]), (&"evaluate".into(), &2.5.into()));
    }

    #[test]
    fn progress_speaks_once_an_interval_and_at_the_end() {
        let work = |report: &Report| {
            let task = report.task(Stage::Read, Unit::Rows, "a.parquet", Some(3));
            (0..3).for_each(|_| task.advance(1));
        };
        let rare = lines(false, Duration::from_secs(3600), work);
        assert_eq!(rare.len(), 1);
        assert_eq!(
            (&rare[0]["message"], &rare[0]["done"], &rare[0]["total"]),
            (&"ended".into(), &3.into(), &3.into())
        );
        assert_eq!(lines(false, Duration::ZERO, work).len(), 4);
    }

    #[test]
    fn quiet_leaves_warnings() {
        let lines = lines(true, Duration::ZERO, |report| {
            report.task(Stage::Read, Unit::Rows, "a", None).advance(1);
            report.note(Stage::Read, "a fact");
            report.warn(Stage::Read, "a warning");
        });
        assert_eq!(lines.len(), 1);
    }
}

//! Events and progress -> bars at the bottom of a terminal, with notes as short lines above them.

use super::clean::clean;
use super::{Event, Progress, Sink, Stage, StepMetrics, Unit};
use crate::fault::Fault;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

const NOTE_CHARACTERS_MAX: usize = 1000;
const LABEL_CHARACTERS_MAX: usize = 40;

/// Shows events and progress on a terminal.
pub struct Terminal {
    bars: MultiProgress,
    tasks: Mutex<HashMap<u64, (Stage, ProgressBar)>>,
    quiet: bool,
}

impl Terminal {
    /// Writes to stderr. `quiet`: only warnings are written.
    pub fn new(quiet: bool) -> Terminal {
        let target = match super::is_dumb(&super::environment) {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        Terminal::on(target, quiet)
    }

    fn on(target: ProgressDrawTarget, quiet: bool) -> Terminal {
        Terminal { bars: MultiProgress::with_draw_target(target), tasks: Mutex::default(), quiet }
    }

    fn line(&self, text: &str) {
        // Hidden bars (stderr is no terminal) would swallow the line.
        if self.bars.is_hidden() {
            // A log reader that went away does not stop a run.
            let _ = writeln!(std::io::stderr(), "{text}");
        } else {
            // A terminal that went away does not stop a run.
            let _ = self.bars.println(text);
        }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<u64, (Stage, ProgressBar)>> {
        self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn start(&self, progress: &Progress) -> ProgressBar {
        let bar = progress.total.map_or_else(ProgressBar::no_length, ProgressBar::new);
        let bar = self.bars.add(bar);
        bar.set_style(style(progress.unit, progress.total.is_some()));
        let label = clean(&progress.label, LABEL_CHARACTERS_MAX);
        bar.set_prefix(format!("{:<9}", progress.stage.name()));
        bar.set_message(label);
        // The bar is redrawn while nothing moves, so that its elapsed time does not look stuck.
        bar.enable_steady_tick(Duration::from_millis(500));
        bar
    }
}

impl Sink for Terminal {
    fn event(&self, event: &Event) {
        match event {
            Event::Warning { .. } | Event::Failed(_) => self.line(&shown(event)),
            Event::Fact { .. } => {}
            _ if self.quiet => {}
            Event::Step(metrics) => {
                let tasks = self.tasks();
                match tasks.values().find(|(stage, _)| *stage == Stage::Train) {
                    Some((_, bar)) if !self.bars.is_hidden() => bar.set_message(step(metrics)),
                    _ => self.line(&shown(event)),
                }
            }
            _ => self.line(&shown(event)),
        }
    }

    fn progress(&self, progress: &Progress) {
        if self.quiet {
            return;
        }
        let mut tasks = self.tasks();
        if progress.finished {
            if let Some((_, bar)) = tasks.remove(&progress.id) {
                bar.finish_and_clear();
            }
            return;
        }
        let (_, bar) = tasks.entry(progress.id).or_insert_with(|| (progress.stage, self.start(progress)));
        if let Some(total) = progress.total
            && bar.length() != Some(total)
        {
            bar.set_style(style(progress.unit, true));
            bar.set_length(total);
        }
        bar.set_position(progress.done);
    }
}

fn style(unit: Unit, has_total: bool) -> ProgressStyle {
    let template = match (unit, has_total) {
        (Unit::Bytes, true) => "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta} {msg}",
        (Unit::Bytes, false) => "{prefix} {spinner} {bytes} {bytes_per_sec} {msg}",
        (Unit::Rows, true) => "{prefix} {bar:24} {human_pos}/{human_len} rows ETA {eta} {msg}",
        (Unit::Rows, false) => "{prefix} {spinner} {human_pos} rows {msg}",
        (Unit::Tensors, true) => "{prefix} {bar:24} {human_pos}/{human_len} tensors ETA {eta} {msg}",
        (Unit::Tensors, false) => "{prefix} {spinner} {human_pos} tensors {msg}",
        (Unit::Steps, true) => "{prefix} {bar:24} {human_pos}/{human_len} steps ETA {eta} {msg}",
        (Unit::Steps, false) => "{prefix} {spinner} {human_pos} steps {msg}",
    };
    ProgressStyle::with_template(template).expect("a test builds every template").progress_chars("━╸ ")
}

/// Returns an event as one line.
fn shown(event: &Event) -> String {
    match event {
        Event::Note { stage, text } => format!("{:<9} {}", stage.name(), clean(text, NOTE_CHARACTERS_MAX)),
        Event::Warning { stage, text } => {
            format!("{:<9} warning: {}", stage.name(), clean(text, NOTE_CHARACTERS_MAX))
        }
        Event::Step(metrics) => format!("{:<9} step {} {}", Stage::Train.name(), metrics.step, step(metrics)),
        Event::Evaluated { step, epoch, eval_loss, accuracy, sources } => {
            let percent = 100.0 * accuracy;
            let stage = Stage::Evaluate.name();
            let losses = sources.iter().filter(|(name, _)| name.ends_with("_loss"));
            let losses: String = losses.map(|(name, value)| format!(" {name} {value:.4}")).collect();
            format!(
                "{stage:<9} step {step} epoch {epoch:.2} eval_loss {eval_loss:.4} accuracy {percent:.1} %{losses}"
            )
        }
        Event::Fact { name, value } => format!("{name} {value}"),
        Event::Failed(fault) => failure(fault),
    }
}

/// Returns an error as text. Line breaks in the message are hone's own (lists of mistakes), so each line is cleaned
/// separately.
fn failure(fault: &Fault) -> String {
    let lines = |text: &str| {
        let lines = text.lines().map(|line| clean(line, NOTE_CHARACTERS_MAX));
        lines.collect::<Vec<_>>().join("\n")
    };
    let help = fault.help.as_deref().map_or_else(String::new, |help| format!("\n  help: {}", lines(help)));
    format!(
        "error ({}, exit code {}): {}{help}",
        fault.kind.name(),
        fault.kind.exit_code(),
        lines(&fault.message)
    )
}

fn step(metrics: &StepMetrics) -> String {
    format!("loss {:.4}, {:.0} tokens/s", metrics.loss, metrics.tokens_per_second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;
    use indicatif::TermLike;
    use std::sync::Arc;

    /// A terminal that keeps the written text and ignores everything else.
    #[derive(Clone, Debug, Default)]
    struct Paper(Arc<Mutex<String>>);

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, line: &str) -> std::io::Result<()> {
            self.write_str(&format!("{line}\n"))
        }
        fn write_str(&self, text: &str) -> std::io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(quiet: bool, work: impl FnOnce(&Report)) -> String {
        let paper = Paper::default();
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(paper.clone()), 255);
        work(&Report::new(Arc::new(Terminal::on(target, quiet))));
        let text = paper.0.lock().unwrap();
        text.clone()
    }

    fn metrics() -> StepMetrics {
        StepMetrics {
            step: 3,
            loss: 1.23456,
            grad_norm: 0.5,
            learning_rate: 2e-5,
            epoch: 0.5,
            num_tokens: 100,
            tokens_per_second: 404.4,
            eta_seconds: 9.0,
        }
    }

    #[test]
    fn every_template_is_one() {
        for unit in [Unit::Bytes, Unit::Rows, Unit::Tensors, Unit::Steps] {
            style(unit, true);
            style(unit, false);
        }
    }

    #[test]
    fn notes_stand_above_bars_and_are_clean() {
        let text = written(false, |report| {
            let task = report.task(Stage::Download, Unit::Bytes, "rows\u{1b}[2J.parquet", Some(100));
            task.advance(50);
            report.note(Stage::Download, "sha256 ab\u{1b}]0;x");
            report.warn(Stage::Tokenize, "3 examples were cut");
        });
        assert!(text.contains("download  sha256 ab\\u{1b}]0;x"), "{text:?}");
        assert!(text.contains("tokenize  warning: 3 examples were cut"), "{text:?}");
        assert!(text.contains("rows\\u{1b}[2J.parquet"), "{text:?}");
        assert!(!text.contains("\u{1b}[2J"), "{text:?}");
    }

    #[test]
    fn the_training_bar_shows_the_loss() {
        let text = written(false, |report| {
            let task = report.task(Stage::Train, Unit::Steps, "", Some(10));
            task.set(4);
            std::thread::sleep(Duration::from_millis(20)); // longer than a frame, or nothing is drawn
            report.say(Event::Step(metrics()));
        });
        assert!(text.contains("4/10 steps") && text.contains("loss 1.2346, 404 tokens/s"), "{text:?}");
        let alone = written(false, |report| report.say(Event::Step(metrics())));
        assert!(alone.contains("train     step 3 loss 1.2346"), "{alone:?}");
    }

    #[test]
    fn quiet_leaves_warnings() {
        let text = written(true, |report| {
            report.task(Stage::Read, Unit::Rows, "a", None).advance(1);
            report.note(Stage::Read, "a fact");
            report.warn(Stage::Read, "a warning");
        });
        assert_eq!(text.trim(), "read      warning: a warning");
    }
}

//! `lr_scheduler_type` and `lr_scheduler_kwargs` -> a schedule.

use super::reader::Reader;
use crate::spec::keys::Section::TrainingArguments as T;
use crate::spec::value::Value as Written;
use crate::train::Schedule;
use crate::train::schedule::{Shape, Stages};

/// Arguments of a schedule, as they were written, and the mistakes in them.
struct Arguments {
    given: Vec<(String, String)>,
    taken: Vec<&'static str>,
    wrong: Vec<String>,
}

impl Arguments {
    fn text(&mut self, name: &'static str) -> Option<String> {
        self.taken.push(name);
        self.given.iter().find(|(given, _)| given == name).map(|(_, value)| value.clone())
    }

    /// Returns a number in the range.
    fn number(&mut self, name: &'static str, min: f64, max: f64) -> Option<f64> {
        let text = self.text(name)?;
        let number = text.replace('_', "").parse::<f64>().ok().filter(|number| (min..=max).contains(number));
        if number.is_none() {
            self.wrong.push(format!("{name}: expected a number from {min} to {max}, found {text}"));
        }
        number
    }

    fn steps(&mut self, name: &'static str) -> Option<u64> {
        self.number(name, 0.0, 1e12).map(|steps| steps as u64)
    }

    fn shape(&mut self, name: &'static str, default: Shape) -> Shape {
        let Some(text) = self.text(name) else { return default };
        Shape::named(&text).unwrap_or_else(|| {
            self.wrong.push(format!("{name}: expected linear, cosine or 1-sqrt, found {text}"));
            default
        })
    }

    /// `min_lr` or `min_lr_rate`, as a share of the peak; one of them is needed.
    fn min(&mut self, learning_rate: f64) -> f64 {
        let rate = self.number("min_lr_rate", 0.0, 1.0);
        let min = self.number("min_lr", 0.0, learning_rate);
        match (min, rate) {
            (Some(_), Some(_)) => self.wrong.push("min_lr and min_lr_rate are both given; choose one".into()),
            (None, None) if self.wrong.is_empty() => {
                self.wrong.push("this schedule needs min_lr or min_lr_rate".into());
            }
            _ => {}
        }
        rate.or(min.map(|min| min / learning_rate)).unwrap_or(0.0)
    }
}

/// Returns the schedule. The reader collects mistakes.
pub(super) fn schedule(reader: &mut Reader, learning_rate: f64) -> Schedule {
    let name = reader.text(T, "lr_scheduler_type").unwrap_or_default();
    let origin = reader.origin(T, "lr_scheduler_kwargs");
    let mut arguments = Arguments { given: Vec::new(), taken: Vec::new(), wrong: Vec::new() };
    match reader.any(T, "lr_scheduler_kwargs") {
        None | Some(Written::Null) => {}
        Some(Written::Map(entries)) => {
            let text = |value: Written| match value {
                Written::Text(text) => text,
                other => other.to_json().to_string(),
            };
            let entries = entries.into_iter().filter(|(_, value)| *value != Written::Null);
            arguments.given = entries.map(|(name, value)| (name, text(value))).collect();
        }
        Some(_) => arguments.wrong.push("expected a map of names to values, such as {num_cycles: 2}".into()),
    }
    let schedule = named(&name, &mut arguments, learning_rate);
    let unknown = arguments.given.iter().find(|(name, _)| !arguments.taken.contains(&name.as_str()));
    if let Some((argument, _)) = unknown {
        let known = match arguments.taken.is_empty() {
            true => "which takes none".to_owned(),
            false => format!("which takes {}", arguments.taken.join(", ")),
        };
        arguments.wrong.push(format!("{argument} is no argument of {name}, {known}"));
    }
    for wrong in arguments.wrong {
        reader.wrong(&origin, format!("TrainingArguments.lr_scheduler_kwargs: {wrong}"));
    }
    schedule
}

fn named(name: &str, arguments: &mut Arguments, learning_rate: f64) -> Schedule {
    const CYCLES_MAX: f64 = 1e6;
    let half = |arguments: &mut Arguments| arguments.number("num_cycles", 0.0, CYCLES_MAX).unwrap_or(0.5);
    match name {
        "cosine" => Schedule::Cosine { cycles: half(arguments) },
        "constant" => Schedule::Constant,
        "constant_with_warmup" => Schedule::ConstantWithWarmup,
        "cosine_with_restarts" => Schedule::CosineWithRestarts {
            cycles: arguments.number("num_cycles", 0.0, CYCLES_MAX).unwrap_or(1.0),
        },
        "polynomial" => {
            // transformers' default end, 1e-7, must lie below the peak.
            let end = arguments.number("lr_end", 0.0, learning_rate).unwrap_or(1e-7);
            let power = arguments.number("power", 0.0, 1e3).unwrap_or(1.0);
            if end >= learning_rate {
                arguments
                    .wrong
                    .push(format!("lr_end: {end} must be smaller than learning_rate, {learning_rate}"));
            }
            Schedule::Polynomial { end: end / learning_rate, power }
        }
        "inverse_sqrt" => Schedule::InverseSqrt { timescale: arguments.number("timescale", 1.0, 1e12) },
        "cosine_with_min_lr" => {
            Schedule::CosineWithMinLr { cycles: half(arguments), min: arguments.min(learning_rate) }
        }
        "cosine_warmup_with_min_lr" => Schedule::CosineWarmupWithMinLr {
            cycles: half(arguments),
            min: arguments.min(learning_rate),
            first: arguments.number("warmup_lr_rate", 0.0, 1.0),
        },
        "warmup_stable_decay" => Schedule::WarmupStableDecay(stages(arguments)),
        _ => Schedule::Linear,
    }
}

fn stages(arguments: &mut Arguments) -> Stages {
    let decay_steps = arguments.steps("num_decay_steps");
    if decay_steps.is_none() && arguments.wrong.is_empty() {
        arguments.wrong.push("warmup_stable_decay needs num_decay_steps".into());
    }
    Stages {
        decay_steps: decay_steps.unwrap_or(0),
        stable_steps: arguments.steps("num_stable_steps"),
        rise: arguments.shape("warmup_type", Shape::Linear),
        fall: arguments.shape("decay_type", Shape::Cosine),
        min: arguments.number("min_lr_ratio", 0.0, 1.0).unwrap_or(0.0),
        cycles: arguments.number("num_cycles", 0.0, 1e6).unwrap_or(0.5),
    }
}

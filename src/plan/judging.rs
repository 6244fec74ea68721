//! The choice of the best evaluation, and its consequences: `metric_for_best_model`, `load_best_model_at_end`, early
//! stopping.

use super::places::Entries;
use super::reader::Reader;
use crate::spec::Origin;
use crate::spec::keys::Section::TrainingArguments as T;
use crate::train::Every;
use crate::train::best::{Judging, Measure, Stopping};

/// Returns the rules for comparing evaluations; `None` if no key asks for it.
pub(super) fn judging(
    reader: &mut Reader,
    entries: &Entries,
    evaluation: Every,
    checkpoint: Every,
) -> Option<Judging> {
    let restore = reader.boolean(T, "load_best_model_at_end");
    let name = reader.text(T, "metric_for_best_model");
    let greater = reader.maybe_boolean(T, "greater_is_better");
    let stopping = stopping(reader);
    let asked = [
        ("load_best_model_at_end", restore),
        ("early_stopping_patience", stopping.is_some()),
        ("save_strategy", checkpoint == Every::Best),
        ("metric_for_best_model", name.is_some()),
    ];
    let (key, _) = asked.into_iter().find(|(_, asked)| *asked)?;
    if evaluation == Every::Never && key == "metric_for_best_model" {
        let origin = reader.origin(T, key);
        reader.warn(format!("{origin}: TrainingArguments.{key} does nothing without an evaluation"));
        return None;
    }
    if evaluation == Every::Never {
        let origin = reader.origin(T, key);
        reader.wrong(
            &origin,
            format!(
                "TrainingArguments.{key}: there is no evaluation to go by; set DatasetConfig.train_test_split below 1 or name \
                 evaluation_data, and set eval_strategy to steps or epoch"
            ),
        );
    }
    let origin = reader.origin(T, "metric_for_best_model");
    let (measure, source) = match name {
        None => (Measure::Loss, None),
        Some(name) => metric(reader, entries, &name, &origin),
    };
    // transformers: greater, unless the name ends in "loss". Of perplexity that would keep the worst.
    let greater = greater.unwrap_or(measure == Measure::Accuracy);
    let judging = Judging { source, measure, greater, restore, stopping };
    reader.derive("best evaluation by", judging.metric(), origin);
    Some(judging)
}

/// Returns the measure of a metric's name, and the source if it is `eval_NAME_loss` and so on.
fn metric(
    reader: &mut Reader,
    entries: &Entries,
    name: &str,
    origin: &Origin,
) -> (Measure, Option<(usize, String)>) {
    if let Some(measure) = Measure::named(name) {
        return (measure, None);
    }
    let sources: Vec<(usize, &str)> = entries.evaluated().collect();
    let bare = name.strip_prefix("eval_").unwrap_or(name);
    let of = |(entry, source): &(usize, &str)| {
        let measure = bare.strip_prefix(source)?.strip_prefix('_').and_then(Measure::named)?;
        Some((measure, Some((*entry, source.to_string()))))
    };
    if sources.len() > 1
        && let Some(found) = sources.iter().find_map(of)
    {
        return found;
    }
    let mut names = Measure::NAMES.map(|(name, _)| name).join(", ");
    if sources.len() > 1 {
        let of = |(_, source): &(usize, &str)| format!(", eval_{source}_loss");
        names += &sources.iter().map(of).collect::<String>();
    }
    reader.wrong(
        origin,
        format!("TrainingArguments.metric_for_best_model: evaluations give {names}; found {name:?}"),
    );
    (Measure::Loss, None)
}

fn stopping(reader: &mut Reader) -> Option<Stopping> {
    let threshold = reader.number(T, "early_stopping_threshold");
    let patience = reader.maybe_integer(T, "early_stopping_patience");
    if let (None, true) = (patience, threshold > 0.0) {
        let origin = reader.origin(T, "early_stopping_threshold");
        let text = format!(
            "{origin}: TrainingArguments.early_stopping_threshold does nothing without early_stopping_patience"
        );
        reader.warn(text);
    }
    patience.map(|patience| Stopping { patience: patience as u64, threshold })
}

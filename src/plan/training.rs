//! Keys -> optimizer, schedule, batches, and when to log, evaluate and save.

use super::places::Entries;
use super::reader::Reader;
use super::{judging, schedule};
use crate::dataset;
use crate::spec::keys::Section;
use crate::train::spike::{Policy, Spikes};
use crate::train::{self, Every, Schedule, Warmup};

/// Tokens of one packed pass. Activations grow with it, and beyond this a pass gains no speed.
const PACKED_TOKENS_MAX: usize = 4096;
/// LIMIT: a checkpoint holds two numbers of each step of the window.
const SPIKE_WINDOW_MAX: i64 = 10_000;

pub(super) fn train_options(
    reader: &mut Reader,
    dataset: &dataset::Options,
    entries: &Entries,
    tokens_max: usize,
    seed: u64,
) -> train::Options {
    use Section::TrainingArguments as T;
    let eight_bit_moments = eight_bit_moments(reader);
    let logging_steps = steps(reader, "logging_steps").unwrap_or(Every::Steps(1));
    let eval_steps = steps(reader, "eval_steps").unwrap_or(logging_steps);
    let save_steps = steps(reader, "save_steps").unwrap_or(Every::Steps(1));
    let max_steps = reader.integer(T, "max_steps");
    let epochs = reader.number(T, "num_train_epochs");
    if max_steps <= 0 && epochs == 0.0 {
        let origin = reader.origin(T, "num_train_epochs");
        reader.wrong(
            &origin,
            "TrainingArguments: num_train_epochs 0 and no max_steps: nothing would be trained",
        );
    }
    let learning_rate = reader.number(T, "learning_rate");
    if learning_rate == 0.0 {
        let origin = reader.origin(T, "learning_rate");
        reader.wrong(
            &origin,
            "TrainingArguments.learning_rate: 0 changes nothing, so that nothing would be learned",
        );
    }
    let clip = reader.number(T, "max_grad_norm");
    let logging_strategy = reader.text(T, "logging_strategy");
    let save_strategy = reader.text(T, "save_strategy");
    let evaluation = evaluation(reader, dataset, eval_steps);
    let checkpoint = every(save_strategy.as_deref(), save_steps);
    tell_of_idle_steps(reader, "logging", logging_strategy.as_deref().unwrap_or("steps"));
    tell_of_idle_steps(reader, "save", save_strategy.as_deref().unwrap_or("steps"));
    let evaluates = eval_strategy(reader, evaluation);
    tell_of_idle_steps(reader, "eval", evaluates);
    let judging = judging::judging(reader, entries, evaluation, checkpoint);
    if let (Every::Minutes(_), Some(_)) = (evaluation, &judging) {
        let origin = reader.origin(Section::Hone, "eval_minutes");
        reader.warn(format!(
            "{origin}: eval_minutes: the best evaluation and early stopping depend on the machine's speed"
        ));
    }
    let schedule = schedule::schedule(reader, learning_rate);
    train::Options {
        learning_rate,
        schedule,
        warmup: warmup(reader, schedule),
        batch_examples: reader.integer(T, "per_device_train_batch_size") as usize,
        eval_batch_examples: reader.integer(T, "per_device_eval_batch_size") as usize,
        accumulation: reader.integer(T, "gradient_accumulation_steps") as usize,
        epochs,
        steps_max: (max_steps > 0).then_some(max_steps as u64),
        weight_decay: reader.number(T, "weight_decay"),
        beta1: reader.number(T, "adam_beta1"),
        beta2: reader.number(T, "adam_beta2"),
        epsilon: reader.number(T, "adam_epsilon"),
        grad_norm_max: (clip > 0.0).then_some(clip),
        packing: reader.boolean(T, "packing").then_some(tokens_max.clamp(512, PACKED_TOKENS_MAX)),
        order_seed: order_seed(reader, dataset, seed),
        seed,
        logging: every(logging_strategy.as_deref(), logging_steps),
        evaluation,
        checkpoint,
        checkpoints_max: reader.maybe_integer(T, "save_total_limit").map(|count| count as usize),
        eval_on_start: reader.boolean(T, "eval_on_start"),
        eval_delay: reader.number(T, "eval_delay"),
        judging,
        loraplus_ratio: reader.maybe_number(T, "loraplus_lr_ratio"),
        label_smoothing: reader.number(T, "label_smoothing_factor"),
        neftune_alpha: reader.maybe_number(T, "neftune_noise_alpha").unwrap_or(0.0),
        spikes: spikes(reader),
        eight_bit_moments,
    }
}

/// Returns the kind of AdamW's moments that `optim` asks for.
fn eight_bit_moments(reader: &mut Reader) -> bool {
    let optimizer = reader.text(Section::TrainingArguments, "optim").unwrap_or_default();
    match optimizer.as_str() {
        "adamw_8bit" | "adamw_bnb_8bit" | "paged_adamw_8bit" => true,
        "adamw_torch_4bit" | "adamw_torch_8bit" | "adamw_anyprecision" => {
            reader.warn(format!(
                "TrainingArguments.optim: {optimizer} runs as AdamW with 32-bit moments, which are more exact and take \
                 more memory; adamw_8bit has 8-bit moments"
            ));
            false
        }
        _ => false,
    }
}

/// Returns the rules of `spike_policy`, `spike_factor` and `spike_window`.
fn spikes(reader: &mut Reader) -> Option<Spikes> {
    use Section::Hone as H;
    let (factor, window) = (reader.number(H, "spike_factor"), reader.integer(H, "spike_window"));
    let policy = match reader.text(H, "spike_policy").as_deref() {
        Some("stop") => Policy::Stop,
        Some("skip") => Policy::Skip,
        _ => {
            for name in ["spike_factor", "spike_window"] {
                if reader.given(H, name).is_some() {
                    let origin = reader.origin(H, name);
                    reader.warn(format!("{origin}: {name} does nothing without spike_policy: stop or skip"));
                }
            }
            return None;
        }
    };
    if window > SPIKE_WINDOW_MAX {
        let origin = reader.origin(H, "spike_window");
        reader.wrong(&origin, format!("spike_window: {window} steps; at most {SPIKE_WINDOW_MAX} are kept"));
    }
    Some(Spikes { policy, factor, window: window as usize })
}

/// Returns a number of steps; below 1, a share of all steps, as in transformers.
fn steps(reader: &mut Reader, key: &str) -> Option<Every> {
    let value = reader.maybe_number(Section::TrainingArguments, key)?;
    if value > 0.0 && value < 1.0 {
        return Some(Every::Share(value));
    }
    if value.fract() != 0.0 || value == 0.0 {
        let origin = reader.origin(Section::TrainingArguments, key);
        reader.wrong(
            &origin,
            format!(
                "TrainingArguments.{key}: expected a whole number of steps, or a share of all steps below 1, found {value}"
            ),
        );
    }
    Some(Every::Steps(value as u64))
}

fn every(strategy: Option<&str>, steps: Every) -> Every {
    match strategy {
        Some("steps") => steps,
        Some("epoch") => Every::Epoch,
        Some("best") => Every::Best,
        _ => Every::Never,
    }
}

/// Warns about a number of steps that the strategy does not go by.
fn tell_of_idle_steps(reader: &mut Reader, what: &str, strategy: &str) {
    let key = format!("{what}_steps");
    if strategy == "steps" || !reader.is_given(Section::TrainingArguments, &key) {
        return;
    }
    let origin = reader.origin(Section::TrainingArguments, &key);
    reader.warn(match strategy {
        "minutes" => format!("{origin}: TrainingArguments.{key} has no effect: eval_minutes decides"),
        _ => format!(
            "{origin}: TrainingArguments.{key} has no effect: {what}_strategy is {strategy}, and only steps goes by it"
        ),
    });
}

/// Returns the strategy in force, as its key names it, or `minutes`. If there are no rows to evaluate on, a warning
/// says so.
fn eval_strategy(reader: &mut Reader, evaluation: Every) -> &'static str {
    match evaluation {
        _ if reader.text(Section::TrainingArguments, "eval_strategy").as_deref() == Some("steps") => "steps",
        Every::Steps(_) | Every::Share(_) => "steps",
        Every::Epoch => "epoch",
        Every::Never | Every::Best => "no",
        Every::Minutes(_) => "minutes",
    }
}

/// Returns the points at which to evaluate. If no key says so: once an epoch, if there are rows to evaluate on.
fn evaluation(reader: &mut Reader, dataset: &dataset::Options, steps: Every) -> Every {
    let split = dataset.train_share < 1.0 || dataset.evaluation_from.is_some();
    let name = "eval_strategy";
    let strategy = reader.text(Section::TrainingArguments, name);
    let minutes = reader.maybe_number(Section::Hone, "eval_minutes").filter(|minutes| *minutes > 0.0);
    let origin = match minutes {
        None => reader.origin(Section::TrainingArguments, name),
        Some(_) => reader.origin(Section::Hone, "eval_minutes"),
    };
    if let (Some(_), Some("steps" | "epoch")) = (minutes, strategy.as_deref()) {
        reader.wrong(
            &origin,
            "eval_minutes and TrainingArguments.eval_strategy both say when to evaluate; remove one",
        );
    }
    let evaluation = match strategy.as_deref() {
        _ if minutes.is_some() && split => Every::Minutes(minutes.unwrap_or_default()),
        None if minutes.is_some() => {
            reader.warn(format!("{origin}: eval_minutes has no effect: there are no rows to evaluate on"));
            Every::Never
        }
        None if split => Every::Epoch,
        Some("steps" | "epoch") if !split => {
            reader.warn(format!("{origin}: TrainingArguments.eval_strategy has no effect: DatasetConfig.train_test_split is 1, which leaves no rows to evaluate on"));
            Every::Never
        }
        strategy => every(strategy, steps),
    };
    let shown = match evaluation {
        Every::Never | Every::Best => "never".to_string(),
        Every::Share(share) => format!("every {share} of all steps"),
        Every::Minutes(minutes) => format!("every {minutes} minutes"),
        Every::Steps(steps) => format!("every {steps} steps"),
        Every::Epoch => "every epoch".to_string(),
    };
    reader.derive("evaluation", shown, origin);
    evaluation
}

/// Returns the warm-up, as transformers reads the keys: `warmup_ratio` overrides `warmup_steps`, and a `warmup_steps`
/// below 1 is a share of all steps.
fn warmup(reader: &mut Reader, schedule: Schedule) -> Warmup {
    let steps = reader.number(Section::TrainingArguments, "warmup_steps");
    let ratio = reader.maybe_number(Section::TrainingArguments, "warmup_ratio");
    for (key, asked) in [("warmup_steps", steps), ("warmup_ratio", ratio.unwrap_or(0.0))] {
        let origin = reader.origin(Section::TrainingArguments, key);
        if asked > 0.0 && schedule == Schedule::Constant {
            reader.warn(format!(
                "{origin}: TrainingArguments.{key} has no effect: lr_scheduler_type constant has no warm-up; \
                 constant_with_warmup has one"
            ));
        } else if asked > 0.0 && key == "warmup_steps" && ratio.is_some() {
            reader.warn(format!(
                "{origin}: TrainingArguments.warmup_steps has no effect: warmup_ratio overrides it"
            ));
        }
    }
    match ratio {
        Some(ratio) => Warmup::Ratio(ratio),
        None if steps > 0.0 && steps < 1.0 => Warmup::Ratio(steps),
        None => Warmup::Steps(steps as u64),
    }
}

fn order_seed(reader: &mut Reader, dataset: &dataset::Options, seed: u64) -> Option<u64> {
    let strategy = reader.text(Section::TrainingArguments, "train_sampling_strategy");
    let data_seed = reader.maybe_integer(Section::TrainingArguments, "data_seed").map(|seed| seed as u64);
    let random = match strategy.as_deref() {
        Some(strategy) => strategy == "random",
        None => dataset.shuffle,
    };
    random.then_some(data_seed.unwrap_or(seed))
}

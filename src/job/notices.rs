//! Settings and sizes that a user should hear of -> notes and warnings of the run.

use super::described::Described;
use crate::dataset::Set;
use crate::facts::{Facts, FourBitCode, LoraOptions, Precision, Quantization, Tokens};
use crate::memory::Running;
use crate::model::decoder::Decoder;
use crate::model::lora::Trainable;
use crate::ops::fp8;
use crate::plan::Plan;
use crate::report::{Report, Stage};
use crate::words;

/// Warns about settings that are easily misread: an unquantised base, a rank that comes from another adapter.
pub(super) fn tell_what_is_trained(plan: &Plan, described: &Described, report: &Report) {
    match described.options.quantization {
        Quantization::None => report.note(
            Stage::Plan,
            "the base is not quantised; QuantizationConfig.load_in_4bit: true would make this run QLoRA",
        ),
        Quantization::FourBit { .. } => {}
        Quantization::Stored { code, double } => {
            tell_of_stored(plan.model.quantization, code, double, report)
        }
    }
    if described.options.precision == Precision::Fp8 {
        report.note(Stage::Plan, products_in_8_bits(&described.facts));
    }
    for warning in described.sites.warnings() {
        report.warn(Stage::Plan, warning);
    }
    let (asked, taken) = (&plan.model.lora, &described.options.lora);
    if described.initial.is_some() {
        tell_of_form(asked, taken, report);
    }
    if described.initial.is_some()
        && (asked.r, asked.alpha, asked.rslora) != (taken.r, taken.alpha, taken.rslora)
    {
        report.warn(
            Stage::Plan,
            format!(
                "the adapter to start from decides r ({}), lora_alpha ({}) and the modules; LoraConfig's r {} and lora_alpha {} \
                 have no effect",
                taken.r, taken.alpha, asked.r, asked.alpha
            ),
        );
    }
}

/// Returns the linear layers whose products are in 8 bits, and those whose widths do not allow it.
fn products_in_8_bits(facts: &Facts) -> String {
    let all = facts.projections().count();
    let taken = facts.projections().filter(|(_, p)| fp8::takes(p.rows, p.cols)).count();
    let rest = match all - taken {
        0 => String::new(),
        rest => {
            format!("; {rest} others stay in bf16, since their widths are no multiples of {}", fp8::MULTIPLE)
        }
    };
    format!("compute: fp8: products with {taken} frozen linear layers are in 8 bits (E4M3){rest}")
}

/// Warns about requested settings of the adapter's form, because the adapter to start from decides them.
fn tell_of_form(asked: &LoraOptions, taken: &LoraOptions, report: &Report) {
    let forms = [
        ("use_dora", asked.dora && !taken.dora),
        ("trainable_token_indices", asked.tokens != Tokens::default() && asked.tokens != taken.tokens),
    ];
    for (key, _) in forms.iter().filter(|(_, idle)| *idle) {
        report.warn(
            Stage::Plan,
            format!("LoraConfig.{key} has no effect: the adapter to start from decides it"),
        );
    }
}

/// Reports that the checkpoint is quantised already. It decides the form; a setting that asks for another form is
/// reported as having no effect.
fn tell_of_stored(asked: Quantization, code: FourBitCode, double: bool, report: &Report) {
    let scales = if double { " with quantised scales" } else { "" };
    let found = format!("the checkpoint is quantised already: {}{scales}, taken as it is", code.name());
    let other = matches!(asked, Quantization::FourBit { code: a, double: b } if (a, b) != (code, double));
    match other {
        false => report.note(Stage::Plan, found),
        true => report.warn(
            Stage::Plan,
            format!("{found}; QuantizationConfig asks for another form, which would need the original model"),
        ),
    }
}

/// Warns if a step has fewer examples than there are ranks to share them.
pub(super) fn warn_of_idle_ranks(plan: &Plan, world: usize, report: &Report) {
    let step = plan.train.batch_examples.saturating_mul(plan.train.accumulation);
    if step < world {
        let text = format!(
            "a step has {step} examples for {world} ranks, so that {} of them have nothing to do; raise \
             per_device_train_batch_size or gradient_accumulation_steps, or use fewer GPUs",
            world - step
        );
        report.warn(Stage::Plan, text);
    }
}

pub(super) fn tell_memory(memory: &Running, report: &Report) {
    for line in memory.table().lines() {
        report.note(Stage::Plan, format!("memory: {line}"));
    }
}

pub(super) fn warn_of_length(examples: &Set, facts: &Facts, report: &Report) {
    let longest = (0..examples.len()).map(|index| examples.tokens(index)).max().unwrap_or(0);
    if longest > facts.positions_max {
        report.warn(
            Stage::Tokenize,
            format!(
                "the longest example has {longest} tokens, but the model was made for {}: lower TrainingArguments.max_length",
                facts.positions_max
            ),
        );
    }
}

/// Returns the loaded base and the adapter, in a sentence.
pub(super) fn loaded(decoder: &Decoder, adapter: &Trainable) -> String {
    let away = decoder.ring.as_ref().map_or(String::new(), |ring| {
        let (device, host) = (ring.device_bytes() as u64, ring.host_bytes() as u64);
        format!(
            ", of whose layers {} lie on the device and {} in host memory",
            words::size(device),
            words::size(host)
        )
    });
    format!(
        "{} with {} parameters in {}{away}; {} trainable on {} linear layers",
        decoder.facts.family,
        decoder.facts.parameters(),
        words::size(decoder.base_bytes() as u64),
        adapter.params.elem_count(),
        adapter.sites.len()
    )
}

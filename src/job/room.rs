//! A job's plan, the model's facts and the examples -> the task that memory is planned for.

use crate::dataset::Set;
use crate::device;
use crate::fault::Result;
use crate::memory::{Machine, Running, Task, card};
use crate::plan::Plan;
use crate::report::Report;

use super::described::Described;

pub use super::described::bf16_checkpoint;

/// Lengths of examples, as far as they are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    /// Tokens of the longest example.
    pub longest: usize,
    /// Mean number of tokens.
    pub mean: usize,
}

impl Lengths {
    /// Returns the lengths of the examples of both sets.
    pub fn of(training: &Set, evaluation: &Set) -> Lengths {
        let of = |set: &Set| (0..set.len()).map(|index| set.tokens(index)).collect::<Vec<_>>();
        let (training, evaluation) = (of(training), of(evaluation));
        let lengths = || training.iter().chain(&evaluation).copied();
        let mean = lengths().sum::<usize>() / lengths().count().max(1);
        Lengths { longest: lengths().max().unwrap_or(1), mean: mean.max(1) }
    }

    /// Returns the lengths to assume before any row is read: all examples have the greatest length allowed.
    pub fn most(plan: &Plan, described: &Described) -> Lengths {
        let longest = plan.tokens.tokens_max.min(described.facts.positions_max);
        Lengths { longest, mean: longest }
    }
}

/// LIMIT: tokens of a pass that a plan computes bytes of. No machine holds so many, and no product overflows.
const PASS_TOKENS_MAX: usize = 1 << 32;

/// Returns the memory plan for a GPU, by its name or instance type, or for the device that the run would use.
pub fn plan(plan: &Plan, described: &Described, gpu: Option<&str>) -> Result<Running> {
    let lengths = Lengths::most(plan, described);
    let machine = match gpu {
        Some(name) => card::machine(name, plan.memory.limit)?,
        None => Machine::of(&device::open(plan.device, &Report::silent())?, plan.memory.limit),
    };
    Running::start(task(plan, described, lengths), machine)
}

pub(super) fn task(plan: &Plan, described: &Described, lengths: Lengths) -> Task {
    let Lengths { longest, mean } = lengths;
    let train = &plan.train;
    let micro_batch = train.batch_examples.saturating_mul(longest);
    let step = micro_batch.saturating_mul(train.accumulation);
    let wanted = match train.packing {
        None => micro_batch.min(PASS_TOKENS_MAX),
        Some(packing) => plan.memory.tokens_max.unwrap_or(packing).min(step),
    };
    Task {
        facts: described.facts.clone(),
        sites: described.sites.list.clone(),
        tokens: described.sites.tokens.clone(),
        quantization: described.options.quantization,
        precision: described.options.precision,
        dropout: described.options.lora.dropout > 0.0,
        bf16_checkpoint: described.bf16_checkpoint,
        tokens_min: longest,
        tokens_max: wanted.min(plan.memory.tokens_max.unwrap_or(usize::MAX)).max(longest),
        example_tokens: mean,
        eight_bit_moments: train.eight_bit_moments,
        keep: plan.memory.keep,
        residency: plan.memory.residency,
    }
}

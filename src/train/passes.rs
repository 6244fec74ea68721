//! A memory plan -> the size of passes and the levels of the layers; the next smaller plan if memory runs out.

use crate::facts::Keep;
use crate::fault::{Fault, Result};
use crate::memory::Running;

/// The size of passes, and the levels of the layers.
#[derive(Clone, Debug)]
pub enum Passes {
    /// Passes by the memory plan. If memory runs out, the next smaller plan follows.
    Planned(Box<Running>),
    /// Passes as large as the options make them, with every layer at one level.
    Fixed(Keep),
}

impl Passes {
    /// Passes by a memory plan.
    pub fn planned(running: Running) -> Passes {
        Passes::Planned(Box::new(running))
    }

    /// Returns the most tokens per pass.
    pub(super) fn tokens_max(&self) -> usize {
        match self {
            Passes::Planned(running) => running.plan.tokens,
            Passes::Fixed(_) => usize::MAX,
        }
    }

    /// Returns the level of each layer.
    pub(super) fn keep(&self, layers: usize) -> Vec<Keep> {
        match self {
            Passes::Planned(running) => running.plan.keep.clone(),
            Passes::Fixed(keep) => vec![*keep; layers],
        }
    }

    /// Returns the number of bytes of device memory that graphs of passes may take.
    pub(super) fn graph_bytes(&self) -> u64 {
        match self {
            Passes::Planned(running) => running.plan.graph_bytes(),
            Passes::Fixed(_) => u64::MAX,
        }
    }

    /// Returns the number of the upper layers whose weights are kept expanded; `None`: as they are.
    pub(super) fn expanded(&self) -> Option<usize> {
        match self {
            Passes::Planned(running) => Some(running.plan.expanded),
            Passes::Fixed(_) => None,
        }
    }

    /// Changes to the next smaller plan after step `step` ran out of memory, and returns a message about it. If there
    /// is none, this is a capacity fault.
    pub(super) fn shrink(&mut self, step: u64, error: &str) -> Result<String> {
        let Passes::Planned(memory) = self else {
            return Err(Fault::capacity(format!("out of memory at step {step}: {error}")));
        };
        if !memory.shrink() {
            return Err(Fault::capacity(format!(
                "out of memory at step {step} with the smallest plan, {}: {error}",
                memory.plan.choice()
            ))
            .help("lower TrainingArguments.max_length or LoraConfig.r, or use a machine with more memory"));
        }
        Ok(format!(
            "out of memory at step {step}; the step is repeated with a smaller plan: {}",
            memory.plan.choice()
        ))
    }
}

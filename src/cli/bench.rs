//! Flags of `hone bench` -> the measurements to make.

use std::path::PathBuf;

use clap::Args;

use super::command::Command;
use super::values::{positive, wrong};
use crate::bench;
use crate::device::Choice;
use crate::facts::{Keep, Precision, Residency};
use crate::memory::Limit;

/// Measure how fast this machine trains a model or a well-known shape, compared with what the machine can do
#[derive(Args)]
#[command(after_help = "Examples:\n  hone bench --shape phi3-mini --tokens 4096 --json speed.json\n  \
    hone bench --model ./phi-3 --lengths one --tokens 8192")]
pub(super) struct Bench {
    /// Base model: a folder, hf://OWNER/NAME, oci://IMAGE or preset:NAME
    #[arg(long, value_name = "DIR", env = "HONE_MODEL", required_unless_present = "shape")]
    model: Option<PathBuf>,
    /// A well-known shape with random weights, in place of a model: tiny, phi3-mini, llama3.1-8b, qwen2.5-7b, ...
    #[arg(long, value_name = "NAME", env = "HONE_SHAPE", conflicts_with = "model")]
    shape: Option<String>,
    /// Tokens in an optimizer step
    #[arg(long, value_name = "TOKENS", default_value = "4096", env = "HONE_TOKENS", value_parser = positive)]
    tokens: usize,
    /// Lengths of the step's examples: one, mixed (as in instruction data), a number, or a file of numbers
    #[arg(long, value_name = "LENGTHS", default_value = "mixed", env = "HONE_LENGTHS")]
    lengths: String,
    /// Number of steps to measure
    #[arg(long, value_name = "STEPS", default_value = "10", env = "HONE_STEPS", value_parser = positive)]
    steps: usize,
    /// Number of steps to run before measuring
    #[arg(long, value_name = "STEPS", default_value = "3", env = "HONE_WARMUP", value_parser = positive)]
    warmup: usize,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = "HONE_DEVICE")]
    device: String,
    /// Type to which the inputs of matrix products are rounded: bf16, f32, or fp8 for those with the frozen base
    #[arg(long, value_name = "TYPE", default_value = "bf16", env = "HONE_PRECISION", value_parser = ["bf16", "f32", "fp8"])]
    precision: String,
    /// Keep the base as the checkpoint has it, instead of storing it in 4 bits
    #[arg(long, env = "HONE_UNQUANTIZED")]
    unquantized: bool,
    /// Rank of the adapter on all linear layers
    #[arg(id = "lora_rank", long = "rank", value_name = "RANK", default_value = "16", env = "HONE_LORA_RANK", value_parser = positive)]
    rank: usize,
    /// Results that each layer keeps for the backward pass: auto, everything, without-gate-up, attention-output,
    /// layer-inputs or host-inputs
    #[arg(long, value_name = "LEVEL", default_value = "auto", env = "HONE_KEEP")]
    keep: String,
    /// Place of the layers' 4-bit weights: auto, resident or streamed
    #[arg(long, value_name = "WHERE", default_value = "auto", env = "HONE_RESIDENCY", value_parser = ["auto", "resident", "streamed"])]
    residency: String,
    /// Upper limit of the memory to use: 20GiB, bytes, or a share of the free memory
    #[arg(long, value_name = "SIZE", env = "HONE_MEMORY_MAX")]
    memory_max: Option<String>,
    /// Upper limit of the tokens in one pass
    #[arg(long, value_name = "TOKENS", env = "HONE_PASS_TOKENS_MAX", value_parser = positive)]
    pass_tokens_max: Option<usize>,
    /// Also write the result as JSON to this file
    #[arg(long, value_name = "FILE", env = "HONE_JSON")]
    json: Option<PathBuf>,
}

impl Bench {
    pub(super) fn command(self) -> Result<Command, String> {
        let json = self.json.clone();
        Ok(Command::Bench { options: self.options()?, json })
    }

    fn options(self) -> Result<bench::Options, String> {
        let keep = match self.keep.as_str() {
            "auto" => None,
            name => Some(Keep::named(name).ok_or_else(|| {
                wrong("keep", name, &format!("auto, {}", Keep::ALL.map(Keep::name).join(", ")))
            })?),
        };
        let limit = |text: String| {
            Limit::parse(&text)
                .ok_or_else(|| wrong("memory-max", &text, "20GiB, bytes or a share from 0 to 1"))
        };
        let device = Choice::parse(&self.device)
            .ok_or_else(|| wrong("device", &self.device, "auto, cpu, cuda or cuda:N"))?;
        Ok(bench::Options {
            base: match (self.shape, self.model) {
                (Some(shape), _) => bench::Base::Shape(shape),
                (None, folder) => bench::Base::Folder(folder.unwrap_or_default()),
            },
            device,
            precision: Precision::named(&self.precision).unwrap_or(Precision::Bf16),
            quantized: !self.unquantized,
            rank: self.rank,
            tokens: self.tokens,
            lengths: self.lengths,
            steps: self.steps,
            warmup: self.warmup,
            keep,
            residency: Residency::named(&self.residency),
            memory_max: self.memory_max.map(limit).transpose()?,
            pass_tokens_max: self.pass_tokens_max,
        })
    }
}

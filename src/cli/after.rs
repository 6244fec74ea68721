//! Flags of the commands that look at a finished adapter: `hone eval`, `hone try`, `hone merge`.

use std::path::PathBuf;

use clap::{ArgMatches, Args, ValueEnum};

use super::command::{Command, Format};
use super::job::Job;
use super::values::positive;
use crate::merge::{self, FileFormat, Onto, Stored};
use crate::tuned::{Named, Split};
use crate::{evaluate, trial};

/// The adapters that a command looks at.
#[derive(Args)]
pub(super) struct Adapters {
    /// Adapter: the output folder of a run, a PEFT folder or oci://IMAGE; a number after a colon (`:0.7`) is its
    /// strength
    #[arg(value_name = "ADAPTER", env = "HONE_TUNED")]
    tuned: String,
    /// A further adapter, added with its strength; may be repeated
    #[arg(
        long = "adapter",
        id = "add_adapter",
        value_name = "ADAPTER:STRENGTH",
        env = "HONE_ADD_ADAPTER",
        value_delimiter = ' '
    )]
    more: Vec<String>,
}

impl Adapters {
    fn named(&self) -> Result<Vec<Named>, String> {
        let all = [&self.tuned].into_iter().chain(&self.more);
        all.map(|text| Named::parse(text).map_err(|fault| fault.in_a_line())).collect()
    }
}

/// Part of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Rows that the configuration holds out
    Evaluation,
    /// Rows that train
    Train,
    /// Every row
    All,
}

impl From<Part> for Split {
    fn from(part: Part) -> Split {
        match part {
            Part::Evaluation => Split::Evaluation,
            Part::Train => Split::Train,
            Part::All => Split::All,
        }
    }
}

/// Measure loss, perplexity, token accuracy and exact match on held-out rows, without the adapter and with it
#[derive(Args)]
#[command(after_help = "Examples:\n  hone eval ./adapter\n  \
    hone eval ./adapter --data test.jsonl --format json\n  \
    hone eval ./adapter:0.7 --adapter ./other:0.3 --split all")]
pub(super) struct Eval {
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    job: Job,
    /// Part of the rows to use [default: the held-out rows of the run's own data, or all rows of other data]
    #[arg(long, value_enum, value_name = "PART", env = "HONE_SPLIT")]
    split: Option<Part>,
    /// Largest number of rows to use
    #[arg(long, value_name = "ROWS", default_value = "200", env = "HONE_ROWS", value_parser = positive)]
    rows: usize,
    /// Number of rows for which answers are generated and compared with the rows' own answers; 0: none
    #[arg(long, value_name = "ROWS", default_value_t = 20, env = "HONE_GENERATE")]
    generate: usize,
    /// A table for people, or JSON
    #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
    format: Format,
}

impl Eval {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let options = evaluate::Options {
            adapters: self.adapters.named()?,
            split: self.split.map(Split::from),
            rows: self.rows,
            generate: self.generate,
        };
        Ok(Command::Eval { request: self.job.request(matches)?, options, format: self.format })
    }
}

/// Ask the base and the tuned model the same questions, and show both answers side by side
#[derive(Args)]
#[command(after_help = "Examples:\n  hone try ./adapter\n  \
    hone try ./adapter --prompt 'My order is late.' --max-tokens 64\n  \
    hone try oci://registry.example.com/adapters/support:1 --model ./phi-3 --prompt 'My order is late.'")]
pub(super) struct Try {
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    job: Job,
    /// Prompt to ask, in place of rows; may be repeated
    #[arg(long, value_name = "TEXT", env = "HONE_PROMPT")]
    prompt: Vec<String>,
    /// System message before every prompt
    #[arg(long, value_name = "TEXT", env = "HONE_SYSTEM", requires = "prompt")]
    system: Option<String>,
    /// Part of the rows to use [default: the held-out rows of the run's own data, or all rows of other data]
    #[arg(long, value_enum, value_name = "PART", env = "HONE_SPLIT", conflicts_with = "prompt")]
    split: Option<Part>,
    /// Number of rows to ask if there is no prompt
    #[arg(
        long,
        value_name = "ROWS",
        default_value = "3",
        env = "HONE_ROWS",
        value_parser = positive,
        conflicts_with = "prompt"
    )]
    rows: usize,
    /// Largest number of tokens in an answer
    #[arg(long, value_name = "TOKENS", default_value = "128", env = "HONE_MAX_TOKENS", value_parser = positive)]
    max_tokens: usize,
    /// Sampling temperature; 0 always takes the most probable token
    #[arg(long, value_name = "NUMBER", default_value = "0", env = "HONE_TEMPERATURE", value_parser = temperature)]
    temperature: f32,
    /// Seed of the sampling, the same for both answers
    #[arg(long, value_name = "SEED", default_value_t = 0, env = "HONE_SEED")]
    seed: u64,
    /// Text for people, or JSON
    #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
    format: Format,
}

fn temperature(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "expected a number from 0 to 100".into())
}

impl Try {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let options = trial::Options {
            adapters: self.adapters.named()?,
            prompts: self.prompt,
            system: self.system,
            split: self.split.map(Split::from),
            rows: self.rows,
            tokens_max: self.max_tokens,
            temperature: self.temperature,
            seed: self.seed,
        };
        Ok(Command::Try { request: self.job.request(matches)?, options, format: self.format })
    }
}

/// Kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Written {
    /// A model folder, as transformers and vLLM load it
    Safetensors,
    /// One file, as llama.cpp and its relatives load it
    Gguf,
}

/// Base that the adapter is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Base {
    /// The checkpoint's own weights
    Original,
    /// The weights that training computed with: 4-bit weights, dequantised
    Trained,
}

/// Add an adapter to its base and write the whole model, as safetensors or GGUF; or the adapter alone as GGUF
#[derive(Args)]
#[command(after_help = "Examples:\n  hone merge ./adapter --to ./merged\n  \
    hone merge ./adapter --to ./gguf --format gguf --type q8_0\n  \
    hone merge ./adapter --to ./lora --format gguf --adapter-only\n  \
    hone merge ./a:0.7 --adapter ./b:0.3 --model ./phi-3 --to ./merged")]
pub(super) struct Merge {
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    job: Job,
    /// New folder for the files
    #[arg(long, value_name = "DIR", env = "HONE_TO")]
    to: PathBuf,
    /// Kind of files
    #[arg(
        long = "format",
        id = "file_format",
        value_enum,
        value_name = "FORMAT",
        default_value = "safetensors",
        env = "HONE_FILE_FORMAT"
    )]
    file_format: Written,
    /// Type of the weights: bf16, f16, f32; q8_0 in GGUF [default: bf16, in GGUF f16]
    #[arg(long = "type", id = "weight_type", value_name = "TYPE", env = "HONE_WEIGHT_TYPE", value_parser = stored)]
    weight_type: Option<Stored>,
    /// Write the adapter alone, as a GGUF LoRA for llama.cpp's --lora
    #[arg(long, env = "HONE_ADAPTER_ONLY")]
    adapter_only: bool,
    /// Largest size of one file of weights: 5GB, 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", env = "HONE_SHARD_SIZE", value_parser = bytes)]
    shard_size: u64,
    /// Base that the adapter is added to
    #[arg(long, value_enum, value_name = "BASE", default_value = "original", env = "HONE_ONTO")]
    onto: Base,
    /// Rows on which the merged model is compared with base and adapter; 0: no comparison
    #[arg(long, value_name = "ROWS", default_value_t = 16, env = "HONE_CHECK_ROWS")]
    check_rows: usize,
}

fn stored(text: &str) -> Result<Stored, String> {
    Stored::named(text).ok_or_else(|| "expected bf16, f16, f32 or q8_0".into())
}

/// Decimal units, as the hub and transformers count shards.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 4] = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000), ("", 1)];
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim(), unit)))
        .expect("every text ends with nothing");
    let number = number.parse().ok().filter(|number: &u64| *number > 0);
    number.and_then(|number| number.checked_mul(*unit)).ok_or_else(|| "expected a size such as 5GB".into())
}

impl Merge {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let format = match self.file_format {
            Written::Safetensors => FileFormat::Safetensors,
            Written::Gguf => FileFormat::Gguf,
        };
        let stored = self.weight_type.unwrap_or(match format {
            FileFormat::Safetensors => Stored::Bf16,
            FileFormat::Gguf => Stored::F16,
        });
        if format == FileFormat::Safetensors && self.adapter_only {
            return Err("--adapter-only: the adapter is a PEFT folder already; add --format gguf".into());
        }
        if stored == Stored::Q8 && (format == FileFormat::Safetensors || self.adapter_only) {
            return Err("--type q8_0: only a whole model in GGUF has it; expected bf16, f16 or f32".into());
        }
        let options = merge::Options {
            adapters: self.adapters.named()?,
            to: self.to,
            format,
            stored,
            adapter_only: self.adapter_only,
            shard_bytes: self.shard_size,
            onto: match self.onto {
                Base::Original => Onto::Original,
                Base::Trained => Onto::Trained,
            },
            check_rows: self.check_rows,
        };
        Ok(Command::Merge { request: self.job.request(matches)?, options })
    }
}

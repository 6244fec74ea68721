//! Flags that say how large a server is, for `hone serve` and `hone plan --serve`.

use clap::Args;

use super::values::positive;
use crate::memory::serving::CacheType;
use crate::serving;

/// Limits that decide how much memory a server needs.
#[derive(Args)]
pub(super) struct ServingSize {
    /// Largest number of tokens of prompt and answer together [default: the model's own limit, if memory allows]
    #[arg(long, value_name = "TOKENS", env = "HONE_CONTEXT", value_parser = positive)]
    context: Option<usize>,
    /// Largest number of sequences that are generated at once
    #[arg(long, value_name = "COUNT", default_value = "16", env = "HONE_SEQUENCES", value_parser = positive)]
    sequences: usize,
    /// Tokens of all sequences together whose keys and values are kept [default: as many as memory allows]
    #[arg(long, value_name = "TOKENS", env = "HONE_CACHE_TOKENS", value_parser = positive)]
    cache_tokens: Option<usize>,
    /// Type in which keys and values are kept: bf16, f32, or fp8 (E4M3, 8 bits)
    #[arg(long, value_name = "TYPE", default_value = "bf16", env = "HONE_CACHE_TYPE", value_parser = CacheType::parse)]
    cache_type: CacheType,
}

impl ServingSize {
    pub(super) fn size(&self) -> serving::room::Size {
        let (context, cache_tokens) = (self.context, self.cache_tokens);
        serving::room::Size { sequences: self.sequences, context, cache_tokens, cache: self.cache_type }
    }
}

//! An adapter's options -> warnings if vLLM's defaults would not serve the adapter, with the settings that would.
//!
//! Source: vLLM's `config/lora.py` (ranks), `lora/peft_helper.py` (the keys of adapter_config.json that it reads),
//! and its model classes. All of hone's families but Falcon take LoRA there; fused modules keep their own names.

use crate::facts::Facts;
use crate::facts::{LoraOptions, Tokens};

/// Allowed values of `max_lora_rank`.
const RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
/// vLLM's default of `max_lora_rank`.
const RANK_MAX: usize = 16;

/// Families whose class in vLLM takes no adapters.
const WITHOUT_LORA: [&str; 1] = ["falcon"];

/// Returns one warning for each problem; none if the adapter loads as it is.
pub fn warnings(facts: &Facts, options: &LoraOptions) -> Vec<String> {
    let mut list = Vec::new();
    let highest =
        options.rank_pattern.iter().map(|(_, rank)| *rank).chain([options.r]).max().unwrap_or(options.r);
    if highest > RANK_MAX {
        list.push(match RANKS.iter().find(|rank| **rank >= highest) {
            Some(rank) => format!(
                "rank {highest}: vLLM serves ranks up to {RANK_MAX} unless it is started with --max-lora-rank {rank} \
                 (KAITO: `vllm: {{max-lora-rank: {rank}}}` in the inference ConfigMap)"
            ),
            None => format!("rank {highest}: vLLM serves no rank above 512; merge the adapter into its base, or lower the rank"),
        });
    }
    if options.dora {
        list.push(
            "use_dora: vLLM loads no adapters with DoRA's magnitudes: serve it with hone serve or peft, or merge it into \
             its base (hone merge)"
                .into(),
        );
    }
    if options.tokens != Tokens::default() {
        list.push(
            "trainable_token_indices: vLLM loads no adapters with trained rows of the embedding: serve it with hone serve \
             or peft, or merge it into its base (hone merge)"
                .into(),
        );
    }
    if !options.rank_pattern.is_empty() || !options.alpha_pattern.is_empty() {
        list.push(
            "rank_pattern and alpha_pattern: vLLM scales every module by lora_alpha / r and would serve this adapter \
             wrongly; peft loads it right"
                .into(),
        );
    }
    if WITHOUT_LORA.contains(&facts.family) {
        list.push(format!(
            "vLLM takes no adapters for {} models: serve it with peft, or merge it into its base",
            facts.family
        ));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::config::Config;
    use crate::facts::family;

    #[test]
    fn what_to_set_is_the_next_rank_that_vllm_knows() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama3/model");
        let facts = family::describe(&Config::read(folder.as_ref()).unwrap()).unwrap();
        let said = |r, pattern: &[usize]| {
            let rank_pattern = pattern.iter().map(|rank| ("q_proj".to_owned(), *rank)).collect();
            warnings(&facts, &LoraOptions { r, rank_pattern, ..LoraOptions::default() })
        };
        assert!(said(16, &[]).is_empty());
        assert!(said(17, &[])[0].contains("--max-lora-rank 32 "));
        assert!(
            said(8, &[300])[0].contains(
                "rank 300: vLLM serves ranks up to 16 unless it is started with --max-lora-rank 320 "
            )
        );
        assert_eq!(said(8, &[300]).len(), 2);
        assert!(said(600, &[])[0].contains("no rank above 512"));
        let dora = warnings(&facts, &LoraOptions { dora: true, ..LoraOptions::default() });
        assert!(dora[0].contains("vLLM loads no adapters with DoRA's magnitudes"), "{dora:?}");
        let falcon = Facts { family: "falcon", ..facts.clone() };
        assert!(warnings(&falcon, &LoraOptions::default())[0].contains("no adapters for falcon"));
    }
}

//! `inference_config.yaml`, the configuration of KAITO's own servers -> flags of `hone serve`, and the settings that
//! have no meaning there.
//!
//! Source: KAITO v0.12, `presets/workspace/inference/vllm/inference_api.py`: below `vllm` stand vLLM's flags without
//! their dashes.

use crate::fault::Result;
use crate::spec::yaml::{self, Content, Node};
use crate::spec::{Mistakes, Origin};

/// The entry of a ConfigMap that is read.
pub const CONFIG_FILE: &str = "inference_config.yaml";

/// The settings of `hone serve` that a configuration asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Most tokens of prompt and answer together.
    pub context: Option<u64>,
    /// Most sequences at once.
    pub sequences: Option<u64>,
    /// Id of the base for clients.
    pub name: Option<String>,
    /// Share of a GPU's memory that a server may use: weights, adapters, keys and values.
    pub gpu_memory: Option<f64>,
    /// Keys that change nothing here, each with the reason.
    pub unused: Vec<String>,
}

/// Keys of vLLM that limit adapters; hone has no such limits.
const LIMITS_OF_ADAPTERS: [&str; 4] = ["max-lora-rank", "max-loras", "max-cpu-loras", "lora-dtype"];
/// Keys whose meaning hone has another place for.
const ELSEWHERE: [(&str, &str); 5] = [
    ("quantization", "hone serves the base in 4 bits unless hone.sh/config-overrides say otherwise"),
    ("dtype", "hone serves the base in 4 bits unless hone.sh/config-overrides say otherwise"),
    ("lora-modules", "adapters are those of inference.adapters"),
    ("port", "the Service leads to port 5000"),
    ("tensor-parallel-size", "one server uses one GPU; resource.count makes more of them"),
];

/// Reads the text. `adapters`: whether the Workspace has any.
///
/// # Errors
/// Config: not YAML, and values that are not what they must be; all of them, with their lines.
pub fn read(map: &str, text: &str, adapters: bool) -> Result<Config> {
    let mut reader = Reader { map, mistakes: Mistakes::default(), config: Config::default(), adapters };
    match yaml::parse(text) {
        Err(refusal) => reader.wrong(refusal.place, refusal.message),
        Ok(None) => {}
        Ok(Some(node)) => reader.root(&node),
    }
    let what = format!("ConfigMap {map}");
    reader.mistakes.into_result_of(&what).map(|()| reader.config)
}

struct Reader<'a> {
    map: &'a str,
    mistakes: Mistakes,
    config: Config,
    adapters: bool,
}

impl Reader<'_> {
    fn wrong(&mut self, place: yaml::Place, why: impl std::fmt::Display) {
        let origin =
            Origin::File { name: format!("ConfigMap {}", self.map), line: place.line, column: place.column };
        self.mistakes.add(&origin, why);
    }

    fn unused(&mut self, key: &str, why: &str) {
        self.config.unused.push(format!("{key}: {why}"));
    }

    fn root(&mut self, node: &Node) {
        let Content::Map(entries) = &node.content else {
            return self.wrong(
                node.place,
                format!("{CONFIG_FILE}: expected keys and values, found {}", node.describe()),
            );
        };
        for entry in entries {
            match (entry.key.as_str(), &entry.node.content) {
                ("vllm", Content::Map(flags)) => {
                    flags.iter().for_each(|flag| self.flag(&flag.key, &flag.node))
                }
                ("vllm", _) if entry.node.is_null() => {}
                ("vllm", _) => {
                    self.wrong(entry.node.place, "vllm: expected flags of vLLM without their dashes")
                }
                (other, _) => self.unused(other, "a setting of KAITO's own servers"),
            }
        }
    }

    /// Reads one flag of vLLM, in which `-` and `_` mean the same.
    fn flag(&mut self, written: &str, node: &Node) {
        let key = written.replace('_', "-");
        match key.as_str() {
            "max-model-len" => match text(node).as_deref() {
                Some("auto" | "-1") => {}
                _ => self.config.context = self.count(written, node),
            },
            "max-num-seqs" => self.config.sequences = self.count(written, node),
            "served-model-name" => self.name(written, node),
            "gpu-memory-utilization" => self.share(written, node),
            "enable-lora" => match text(node).as_deref() {
                Some("true" | "True") => {}
                Some("false" | "False") if !self.adapters => {}
                Some("false" | "False") => {
                    self.wrong(node.place, "vllm.enable-lora: false, and inference.adapters names adapters")
                }
                _ => self.wrong(
                    node.place,
                    format!("vllm.enable-lora: expected true or false, found {}", node.describe()),
                ),
            },
            known if LIMITS_OF_ADAPTERS.contains(&known) => {}
            "tensor-parallel-size" | "pipeline-parallel-size" if text(node).as_deref() == Some("1") => {}
            other => {
                let place = ELSEWHERE.iter().find(|(name, _)| *name == other);
                self.unused(
                    &format!("vllm.{written}"),
                    place.map_or("hone serve has no such setting", |(_, why)| why),
                );
            }
        }
    }

    /// Reads the names of the model. The first one is the base's id.
    fn name(&mut self, written: &str, node: &Node) {
        let names: Vec<String> = match &node.content {
            Content::List(items) => items.iter().filter_map(text).collect(),
            _ => text(node).into_iter().collect(),
        };
        let Some((first, others)) = names.split_first() else {
            return self
                .wrong(node.place, format!("vllm.{written}: expected a name, found {}", node.describe()));
        };
        if !is_id(first) {
            self.wrong(
                node.place,
                format!("vllm.{written} {first:?}: expected 1 to 128 letters, digits, '.', '_', '/' or '-'"),
            );
        }
        if !others.is_empty() {
            self.unused(&format!("vllm.{written}"), &format!("of its names only {first} is used"));
        }
        self.config.name = Some(first.clone());
    }

    /// Reads the share of memory. vLLM means a share of the whole card, hone of the card's free memory; in a pod the
    /// card is empty.
    fn share(&mut self, written: &str, node: &Node) {
        let found = text(node).and_then(|text| text.parse::<f64>().ok());
        self.config.gpu_memory = found.filter(|share| *share > 0.0 && *share <= 1.0);
        if self.config.gpu_memory.is_none() {
            self.wrong(
                node.place,
                format!("vllm.{written}: expected a number above 0, at most 1, found {}", node.describe()),
            );
        }
    }

    /// Parses a count as vLLM writes it: `4096`, `4k` (thousands), `4K` (1,024s).
    fn count(&mut self, written: &str, node: &Node) -> Option<u64> {
        let found = text(node).and_then(|text| count(&text)).filter(|count| *count > 0);
        if found.is_none() {
            self.wrong(
                node.place,
                format!("vllm.{written}: expected a whole number from 1, found {}", node.describe()),
            );
        }
        found
    }
}

fn text(node: &Node) -> Option<String> {
    match &node.content {
        Content::Scalar { text, .. } => Some(text.trim().to_owned()),
        _ => None,
    }
}

fn count(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "K" => 1 << 10,
        "m" => 1_000_000,
        "M" => 1 << 20,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

fn is_id(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    (1..=128).contains(&name.len()) && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_meaning_is_read_and_the_rest_is_told() {
        let text = "kv_cache_cpu_memory_utilization: 0.5\nmax_probe_steps: 6\nvllm:\n  max-model-len: 32K\n  max_num_seqs: 8\n  \
                    served-model-name: [phi, other]\n  enable-lora: true\n  max-lora-rank: 64\n  gpu-memory-utilization: 0.9\n  \
                    tensor-parallel-size: 1\n  swap-space: 4\n";
        let config = read("c", text, true).unwrap();
        assert_eq!(
            (config.context, config.sequences, config.name.as_deref(), config.gpu_memory),
            (Some(32 << 10), Some(8), Some("phi"), Some(0.9))
        );
        let keys: Vec<&str> = config.unused.iter().map(|told| told.split(": ").next().unwrap()).collect();
        assert_eq!(
            keys,
            [
                "kv_cache_cpu_memory_utilization",
                "max_probe_steps",
                "vllm.served-model-name",
                "vllm.swap-space"
            ]
        );
        for empty in ["", "vllm:\n", "vllm: {}", "vllm: {max-model-len: auto}", "vllm: {enable-lora: false}"]
        {
            assert_eq!(read("c", empty, false).unwrap(), Config::default(), "{empty:?}");
        }
    }

    #[test]
    fn what_is_wrong_has_its_line() {
        let text = "vllm:\n  max-model-len: many\n  max-num-seqs: 0\n  enable-lora: false\n  gpu_memory_utilization: 1.5\n";
        let told = read("c", text, true).unwrap_err();
        for part in [
            "4 mistakes",
            "ConfigMap c:5:27: vllm.gpu_memory_utilization: expected a number above 0, at most 1",
            "ConfigMap c:2:18: vllm.max-model-len: expected a whole number from 1, found \"many\"",
            "ConfigMap c:3:17: vllm.max-num-seqs",
            "ConfigMap c:4:16: vllm.enable-lora: false, and inference.adapters names adapters",
        ] {
            assert!(told.message.contains(part), "{part}: {told}");
        }
        assert!(read("c", "vllm: [1]", false).unwrap_err().message.contains("expected flags of vLLM"));
        assert!(read("c", "- 1", false).is_err() && read("c", "a: [", false).is_err());
    }
}

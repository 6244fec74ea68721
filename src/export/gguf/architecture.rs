//! A family's facts -> llama.cpp's architecture: its name, its keys, the name and the order of each tensor.
//!
//! Source: llama.cpp's model loaders (`src/models`) and converters. A form of a family that llama.cpp computes
//! otherwise is refused, and the message names the difference.

use super::file::Value;
use crate::facts::rope::{Rope, Scaling};
use crate::facts::{Facts, Function, Layout, NormForm};
use crate::fault::{Fault, Result};

/// Names of the tensors outside the layers.
pub const EMBEDDING: &str = "token_embd.weight";
/// The output head.
pub const HEAD: &str = "output.weight";
/// Families with a file of their architecture.
const COVERED: &str =
    "falcon, gemma2, gemma3_text, granite, llama, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3";
/// SmolLM 3 leaves rope out in every layer of this number.
const NO_ROPE_PERIOD: usize = 4;
/// Gemma 3 sees everything in every layer of this number.
const FULL_PERIOD: usize = 6;
/// Largest difference of two numbers that should be the same.
const SAME: f64 = 1e-4;

/// llama.cpp's name for a family, and the form that it wants its tensors in.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// Pairs that rope turns lie side by side: rows of queries and keys change places.
    interleaved: bool,
    /// A tied head is written once more, since the loader wants one.
    pub copies_tied_head: bool,
    /// A remark for the user.
    pub warnings: Vec<String>,
}

/// A tensor's name and form in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Order of the rows in the file.
    pub order: Order,
    /// A number that is added to every value: Gemma's norms are stored as their difference from 1.
    pub plus: f32,
}

/// Order of a tensor's rows in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// The order of the checkpoint.
    Same,
    /// Row i of the file is this row of the checkpoint.
    Rows(Vec<usize>),
}

impl Order {
    /// Changes the checkpoint's order into the file's.
    pub fn apply(&self, values: &[f32], cols: usize) -> Vec<f32> {
        match self {
            Order::Same => values.to_vec(),
            Order::Rows(rows) => rows.iter().flat_map(|row| &values[row * cols..][..cols]).copied().collect(),
        }
    }

    /// Returns the other way.
    pub fn undo(&self, values: &[f32], cols: usize) -> Vec<f32> {
        let Order::Rows(rows) = self else { return values.to_vec() };
        let mut out = vec![0.0; values.len()];
        for (from, &to) in rows.iter().enumerate() {
            out[to * cols..][..cols].copy_from_slice(&values[from * cols..][..cols]);
        }
        out
    }
}

impl Architecture {
    /// Returns the architecture of a model.
    ///
    /// # Errors
    /// Model: a family or a form that llama.cpp does not compute.
    pub fn of(facts: &Facts) -> Result<Architecture> {
        let (name, interleaved) = match facts.family {
            "llama" | "mistral" => ("llama", true),
            "granite" => ("granite", true),
            "smollm3" => ("smollm3", true),
            "qwen2" => ("qwen2", false),
            "qwen3" => ("qwen3", false),
            "phi3" => ("phi3", false),
            "phi" => ("phi2", false),
            "gemma2" => ("gemma2", false),
            "gemma3_text" => ("gemma3", false),
            "olmo2" => ("olmo2", false),
            "falcon" => ("falcon", false),
            family => {
                return Err(Fault::model(format!("GGUF: {family} models are not covered, only {COVERED}"))
                    .help("write safetensors, and convert them with llama.cpp's own converter"));
            }
        };
        let mut architecture = Architecture {
            name,
            interleaved,
            copies_tied_head: matches!(name, "olmo2" | "phi2"),
            warnings: Vec::new(),
        };
        architecture.check(facts)?;
        Ok(architecture)
    }

    /// Refuses a model whose values differ from those that the loader of this architecture assumes.
    fn check(&mut self, facts: &Facts) -> Result<()> {
        let heads = facts.heads();
        let refused = |what: String| {
            Err(Fault::model(format!("GGUF: llama.cpp's {} {what}", self.name))
                .help("write safetensors; transformers and vLLM compute the model as it is"))
        };
        let function = facts.layers[0].feed_forward.activation();
        let expected: &[Function] = match self.name {
            "gemma2" | "gemma3" | "phi2" => &[Function::GeluTanh],
            "falcon" => &[Function::GeluErf, Function::GeluTanh],
            _ => &[Function::Silu],
        };
        if !expected.contains(&function) {
            return refused(format!("computes another activation than this model's {function:?}"));
        }
        let rope = &facts.ropes[0];
        if self.interleaved && rope.rotary != heads.width {
            return refused(format!(
                "turns whole heads; this model turns {} of {}",
                rope.rotary, heads.width
            ));
        }
        if rope.rotary != heads.width && !matches!(self.name, "phi2" | "phi3") {
            return refused("turns whole heads".into());
        }
        let plain = (heads.width as f64).sqrt().recip();
        if (heads.scale - plain).abs() > SAME && self.name != "granite" {
            return refused(format!("scales scores by {plain:.4}; this model by {:.4}", heads.scale));
        }
        if let Some(what) = rope_refused(rope) {
            return refused(what);
        }
        self.warnings.extend(rope_differs(facts));
        let has_bias = |path: &str| facts.layers[0].projections().any(|p| p.bias && p.path.contains(path));
        let bias_known = match self.name {
            "llama" | "phi2" | "granite" | "smollm3" => true,
            "qwen2" => !has_bias("o_proj") && !has_bias("mlp"),
            _ => !facts.layers[0].projections().any(|p| p.bias),
        };
        if !bias_known {
            return refused("has no biases where this model has them".into());
        }
        if facts.head_bias && self.name != "phi2" {
            return refused("has no bias of the output head".into());
        }
        if !facts.tied_head && self.name == "gemma2" {
            return refused("ties the head to the embedding".into());
        }
        self.check_layers(facts)
    }

    fn check_layers(&mut self, facts: &Facts) -> Result<()> {
        let refused = |what: &str| {
            Err(Fault::model(format!("GGUF: llama.cpp's {} {what}", self.name)).help("write safetensors"))
        };
        let layers = || facts.layers.iter().enumerate();
        match self.name {
            "smollm3" => {
                let same = |(at, layer): (usize, &crate::facts::LayerFacts)| {
                    layer.attention.rope.is_none() == ((at + 1) % NO_ROPE_PERIOD == 0)
                };
                if !layers().all(same) {
                    return refused("leaves rope out in every fourth layer; this model in others");
                }
            }
            "gemma3" => {
                let same = |(at, layer): (usize, &crate::facts::LayerFacts)| {
                    layer.attention.heads.window.is_none() == ((at + 1) % FULL_PERIOD == 0)
                };
                if !layers().all(same) {
                    return refused("sees everything in every sixth layer; this model in others");
                }
            }
            "gemma2" => {
                let same = |(at, layer): (usize, &crate::facts::LayerFacts)| {
                    layer.attention.heads.window.is_some() == (at % 2 == 0)
                };
                if !layers().all(same) {
                    return refused("has windows in every other layer; this model in others");
                }
            }
            "falcon" if !facts.parallel => return refused("computes parallel layers only"),
            _ => {
                if let Some(window) = facts.layers.iter().find_map(|layer| layer.attention.heads.window) {
                    self.warnings.push(format!(
                        "llama.cpp's {} sees every token, this model a window of {window}: longer contexts differ",
                        self.name
                    ));
                }
            }
        }
        Ok(())
    }

    /// Returns the keys of the model's sizes.
    pub fn keys(&self, facts: &Facts) -> Vec<(String, Value)> {
        let heads = facts.heads();
        let count = |number: usize| Value::U32(u32::try_from(number).unwrap_or(u32::MAX));
        let float = |number: f64| Value::F32(number as f32);
        let eps = match facts.norm.form {
            NormForm::Layer => "attention.layer_norm_epsilon",
            NormForm::Rms | NormForm::RmsPlusOne => "attention.layer_norm_rms_epsilon",
        };
        let mut keys = vec![
            ("vocab_size", count(facts.vocab)),
            ("context_length", count(facts.positions_max)),
            ("embedding_length", count(facts.width)),
            ("block_count", count(facts.layers.len())),
            ("feed_forward_length", count(facts.layers[0].feed_forward.width())),
            ("attention.head_count", count(heads.query)),
            ("attention.head_count_kv", count(heads.key)),
            ("attention.key_length", count(heads.width)),
            ("attention.value_length", count(heads.width)),
            (eps, float(facts.norm.eps)),
            ("rope.dimension_count", count(facts.ropes[0].rotary)),
            ("rope.freq_base", Value::F32(facts.ropes[0].theta)),
        ];
        keys.extend(rope_keys(&facts.ropes[0]));
        match self.name {
            "phi3" => keys.push(("attention.sliding_window", count(heads.window.unwrap_or(0)))),
            "gemma2" | "gemma3" => {
                let window = facts.layers.iter().find_map(|layer| layer.attention.heads.window);
                keys.push(("attention.sliding_window", count(window.unwrap_or(0))));
                let caps = [
                    ("attn_logit_softcapping", heads.softcap),
                    ("final_logit_softcapping", facts.logits_softcap),
                ];
                keys.extend(caps.into_iter().filter_map(|(key, cap)| Some((key, float(cap?)))));
                if let Some(sliding) = facts.ropes.get(1) {
                    keys.push(("rope.freq_base_swa", Value::F32(sliding.theta)));
                }
            }
            "granite" => keys.extend([
                ("attention.scale", float(heads.scale)),
                ("embedding_scale", float(facts.embedding_scale.factor)),
                ("residual_scale", float(facts.residual_scale)),
                ("logit_scale", float(facts.logits_scale.recip())),
            ]),
            _ => {}
        }
        keys.into_iter().map(|(key, value)| (format!("{}.{key}", self.name), value)).collect()
    }

    /// Returns the tensors of factors that divide rope's frequencies.
    pub fn factors(&self, facts: &Facts) -> Vec<(&'static str, Vec<f32>)> {
        let rope = &facts.ropes[0];
        match &rope.scaling {
            Scaling::Llama3 { .. } => {
                let plain = Rope { scaling: Scaling::None, ..rope.clone() }.frequencies(1);
                let scaled = rope.frequencies(1);
                let factors = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
                vec![("rope_freqs.weight", factors)]
            }
            Scaling::Long { short, long, .. } => {
                vec![("rope_factors_long.weight", long.clone()), ("rope_factors_short.weight", short.clone())]
            }
            _ => Vec::new(),
        }
    }

    /// Returns the name and the form of a tensor by the name that the checkpoint has for it.
    pub fn entry(&self, facts: &Facts, name: &str) -> Result<Entry> {
        let (path, end) = name.rsplit_once('.').unwrap_or((name, ""));
        let names = &facts.names;
        let plus = match facts.norm.form {
            NormForm::RmsPlusOne if path.ends_with("norm") => 1.0,
            _ => 0.0,
        };
        let same = |name: &str| Entry { name: format!("{name}.{end}"), order: Order::Same, plus };
        if name == names.embedding {
            return Ok(same("token_embd"));
        }
        if path == names.final_norm {
            return Ok(same("output_norm"));
        }
        if path == names.head {
            return Ok(same("output"));
        }
        let inside = path.strip_prefix(names.layers).and_then(|rest| rest.strip_prefix('.'));
        let found = inside.and_then(|rest| rest.split_once('.'));
        let unknown = || Fault::internal(format!("GGUF: no name for {name}"));
        let (layer, path) = found.ok_or_else(unknown)?;
        let called = self.called(facts, path).ok_or_else(unknown)?;
        let order = self.order(facts, called);
        Ok(Entry { order, ..same(&format!("blk.{layer}.{called}")) })
    }

    /// Returns the name of a module inside a layer.
    fn called(&self, facts: &Facts, path: &str) -> Option<&'static str> {
        let names = &facts.names;
        let is = |name: Option<&str>| name == Some(path);
        if self.name == "falcon" && names.attention_norm != names.feed_forward_norm {
            match path {
                _ if is(names.attention_norm) => return Some("attn_norm_2"),
                _ if is(names.feed_forward_norm) => return Some("attn_norm"),
                _ => {}
            }
        }
        match path {
            _ if is(names.attention_norm) => Some("attn_norm"),
            _ if is(names.attention_post_norm) => Some("post_attention_norm"),
            _ if is(names.feed_forward_norm) => Some("ffn_norm"),
            _ if is(names.feed_forward_post_norm) => Some("post_ffw_norm"),
            "self_attn.q_norm" => Some("attn_q_norm"),
            "self_attn.k_norm" => Some("attn_k_norm"),
            "self_attn.q_proj" => Some("attn_q"),
            "self_attn.k_proj" => Some("attn_k"),
            "self_attn.v_proj" => Some("attn_v"),
            "self_attn.qkv_proj" | "self_attention.query_key_value" => Some("attn_qkv"),
            "self_attn.o_proj" | "self_attn.dense" | "self_attention.dense" => Some("attn_output"),
            "mlp.gate_proj" => Some("ffn_gate"),
            "mlp.up_proj" | "mlp.gate_up_proj" | "mlp.fc1" | "mlp.dense_h_to_4h" => Some("ffn_up"),
            "mlp.down_proj" | "mlp.fc2" | "mlp.dense_4h_to_h" => Some("ffn_down"),
            _ => None,
        }
    }

    fn order(&self, facts: &Facts, called: &str) -> Order {
        let heads = facts.heads();
        match called {
            "attn_q" if self.interleaved => interleaved(heads.query, heads.width),
            "attn_k" if self.interleaved => interleaved(heads.key, heads.width),
            "attn_qkv" if heads.layout == Layout::Grouped => {
                let from = (0..heads.query)
                    .map(|head| heads.query_at(head))
                    .chain((0..heads.key).map(|head| heads.key_at(head)))
                    .chain((0..heads.key).map(|head| heads.value_at(head)));
                Order::Rows(from.flat_map(|from| from..from + heads.width).collect())
            }
            _ => Order::Same,
        }
    }
}

/// Returns the order of rows for llama.cpp, which rotates neighbouring rows of a head; transformers rotates row i with
/// row i + width / 2.
fn interleaved(heads: usize, width: usize) -> Order {
    let half = width / 2;
    let row = |at: usize| {
        let (head, at) = (at / width, at % width);
        head * width + at % 2 * half + at / 2
    };
    Order::Rows((0..heads * width).map(row).collect())
}

fn rope_refused(rope: &Rope) -> Option<String> {
    match &rope.scaling {
        Scaling::Dynamic { .. } => Some("has no dynamic rope".into()),
        Scaling::Yarn { truncate: false, .. } => {
            Some("rounds the ends of yarn's ramp; this model does not".into())
        }
        Scaling::Yarn { factor, attention, .. } => {
            let usual = 0.1 * f64::from(*factor).ln() + 1.0;
            let differs = (f64::from(*attention) - usual).abs() > SAME;
            differs.then(|| format!("scales yarn's cos and sin by {usual:.4}; this model by {attention:.4}"))
        }
        _ => None,
    }
}

/// llama.cpp takes the long factors if its whole context (`-c`) is longer than `positions`, even for a short prompt.
fn rope_differs(facts: &Facts) -> Option<String> {
    match &facts.ropes[0].scaling {
        Scaling::Long { positions, .. } if facts.positions_max > *positions => Some(format!(
            "llama.cpp chooses longrope's factors by the size of its context, this model by the length of a text: run \
             it with a context of at most {positions} tokens (-c), or texts up to this length differ"
        )),
        _ => None,
    }
}

fn rope_keys(rope: &Rope) -> Vec<(&'static str, Value)> {
    let kind = |name: &str| ("rope.scaling.type", Value::Text(name.into()));
    let positions = |count: &usize| ("rope.scaling.original_context_length", Value::U32(*count as u32));
    match &rope.scaling {
        Scaling::Linear { factor } => vec![kind("linear"), ("rope.scaling.factor", Value::F32(*factor))],
        Scaling::Yarn { factor, fast, slow, positions: count, .. } => vec![
            kind("yarn"),
            ("rope.scaling.factor", Value::F32(*factor)),
            positions(count),
            ("rope.scaling.yarn_beta_fast", Value::F32(*fast as f32)),
            ("rope.scaling.yarn_beta_slow", Value::F32(*slow as f32)),
        ],
        Scaling::Long { positions: count, attention, .. } => {
            vec![kind("longrope"), positions(count), ("rope.scaling.attn_factor", Value::F32(*attention))]
        }
        Scaling::None | Scaling::Dynamic { .. } | Scaling::Llama3 { .. } => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::config::Config;
    use crate::facts::family;
    use std::path::Path;

    fn facts(name: &str) -> Facts {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model");
        family::describe(&Config::read(&folder).unwrap()).unwrap()
    }

    #[test]
    fn orders_are_undone() {
        let values: Vec<f32> = (0..48).map(|value| value as f32).collect();
        let order = interleaved(2, 8);
        let applied = order.apply(&values, 3);
        assert_eq!(applied[..9], [0.0, 1.0, 2.0, 12.0, 13.0, 14.0, 3.0, 4.0, 5.0]);
        assert_eq!(order.undo(&applied, 3), values);
        let falcon = Architecture::of(&facts("falcon40b")).unwrap();
        let Order::Rows(mut rows) = falcon.order(&facts("falcon40b"), "attn_qkv") else { panic!() };
        rows.sort_unstable();
        assert_eq!(rows, (0..rows.len()).collect::<Vec<_>>(), "every row once");
    }

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        for name in [
            "llama3",
            "llama_odd",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
            "phi2",
            "granite",
            "olmo2",
            "falcon40b",
        ] {
            let facts = facts(name);
            let architecture = Architecture::of(&facts).unwrap_or_else(|fault| panic!("{name}: {fault}"));
            let names: Vec<String> = facts
                .tensors()
                .iter()
                .map(|tensor| architecture.entry(&facts, &tensor.name).unwrap().name)
                .collect();
            let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
            assert_eq!(distinct.len(), names.len(), "{name}: {names:?}");
        }
    }

    #[test]
    fn what_llama_cpp_computes_otherwise_is_refused() {
        for (name, said) in [
            ("ministral", "ministral models are not covered"),
            ("ministral3", "ministral3 models are not covered"),
            ("gemma2", "scales scores by 0.1768"),
            ("smollm3", "leaves rope out in every fourth layer"),
            ("llama_dynamic", "no dynamic rope"),
        ] {
            let fault = Architecture::of(&facts(name)).unwrap_err();
            assert!(fault.message.contains(said), "{name}: {fault}");
        }
    }

    #[test]
    fn factors_that_llama_cpp_chooses_otherwise_are_told() {
        let warnings = |name: &str| Architecture::of(&facts(name)).unwrap().warnings;
        let told = warnings("phi3_longrope");
        assert!(told.iter().any(|told| told.contains("a context of at most 72 tokens")), "{told:?}");
        assert_eq!(warnings("llama3"), Vec::<String>::new());
    }
}

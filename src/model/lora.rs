//! Which layers get a LoRA pair, by PEFT's rules, and the flat buffers their parameters live in.
//!
//! All pairs share one flat parameter buffer and one flat gradient buffer (f32; f64 in tests), so that the
//! optimizer, the norm and, on a GPU, the all-reduce are each one operation. A [R, K] then B [N, R], site by site.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use regex::Regex;

use crate::fault::{Fault, Result};
use crate::ops::flat;

use super::facts::{Facts, Projection};
use super::{LoraInit, LoraOptions, Targets};

/// A linear layer that gets a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    pub layer: usize,
    pub projection: Projection,
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    pub rank: usize,
    /// alpha / r, or alpha / sqrt(r).
    pub scale: f64,
    /// Where A begins in the flat buffer; B follows.
    pub offset: usize,
}

impl Site {
    pub fn parameters(&self) -> usize {
        self.rank * (self.projection.rows + self.projection.cols)
    }
}

/// The chosen sites, and which names were understood as others.
#[derive(Clone, Debug, PartialEq)]
pub struct Sites {
    pub list: Vec<Site>,
    /// (as written, module that holds it): `q_proj` -> `qkv_proj`.
    pub renamed: Vec<(String, String)>,
    /// Names of target_modules and exclude_modules that match nothing.
    pub unmatched: Vec<String>,
}

impl Sites {
    pub fn parameters(&self) -> usize {
        self.list.iter().map(Site::parameters).sum()
    }
}

/// Chooses the sites among the decoder's projections.
pub fn sites(facts: &Facts, options: &LoraOptions) -> Result<Sites> {
    let matcher = Matcher::new(facts, options)?;
    let ranks = patterns("rank_pattern", &options.rank_pattern)?;
    let alphas = patterns("alpha_pattern", &options.alpha_pattern)?;
    let (mut list, mut offset) = (Vec::new(), 0);
    for layer in 0..facts.layers {
        for projection in facts.projections() {
            let path = facts.path(layer, projection);
            if !matcher.wants(layer, &path) {
                continue;
            }
            let rank = first_match(&ranks, &path).unwrap_or(options.r);
            let alpha = first_match(&alphas, &path).unwrap_or(options.alpha);
            let divisor = if options.rslora { (rank as f64).sqrt() } else { rank as f64 };
            let site =
                Site { layer, projection: projection.clone(), path, rank, scale: alpha / divisor, offset };
            offset += site.parameters();
            list.push(site);
        }
    }
    if list.is_empty() {
        let known: Vec<&str> = facts.projections().map(|p| p.path).collect();
        return Err(Fault::config(format!(
            "LoraConfig.target_modules matches no linear layer of this {} model; it has {}",
            facts.family,
            known.join(", ")
        ))
        .help("name some of them (the last part is enough), or \"all-linear\""));
    }
    let unmatched = matcher.unmatched(facts);
    Ok(Sites { list, renamed: matcher.renamed, unmatched })
}

/// PEFT's matching: a list matches whole paths or suffixes after a dot, a text is a regular expression for the
/// whole path.
struct Matcher<'a> {
    options: &'a LoraOptions,
    names: Option<Vec<String>>,
    pattern: Option<Regex>,
    renamed: Vec<(String, String)>,
}

impl<'a> Matcher<'a> {
    fn new(facts: &Facts, options: &'a LoraOptions) -> Result<Matcher<'a>> {
        let mut matcher = Matcher { options, names: None, pattern: None, renamed: Vec::new() };
        match &options.targets {
            Targets::AllLinear => {}
            Targets::Pattern(text) => {
                matcher.pattern = Some(regex("target_modules", &format!("^(?:{text})$"))?)
            }
            Targets::Names(names) => {
                let renamed = |name: &String| {
                    let (_, fused) = facts.aliases.iter().find(|(split, _)| name == split)?;
                    Some((name.clone(), (*fused).to_owned()))
                };
                matcher.renamed = names.iter().filter_map(renamed).collect();
                matcher.names = Some(
                    names
                        .iter()
                        .map(|name| renamed(name).map_or_else(|| name.clone(), |(_, to)| to))
                        .collect(),
                );
            }
        }
        Ok(matcher)
    }

    /// Names without a layer: most often a slip of the pen, and PEFT says nothing of them.
    fn unmatched(&self, facts: &Facts) -> Vec<String> {
        let paths: Vec<String> = (0..facts.layers)
            .flat_map(|layer| facts.projections().map(move |projection| facts.path(layer, projection)))
            .collect();
        let targets = self.names.iter().flatten().map(|name| ("target_modules", name));
        let excluded = self.options.exclude.iter().map(|name| ("exclude_modules", name));
        let idle = |name: &str| !paths.iter().any(|path| is_or_ends_with(path, name));
        let idle = targets.chain(excluded).filter(|(_, name)| idle(name));
        idle.map(|(key, name)| format!("LoraConfig.{key}: {name}")).collect()
    }

    fn wants(&self, layer: usize, path: &str) -> bool {
        let named = |names: &[String]| names.iter().any(|name| is_or_ends_with(path, name));
        let excluded = named(&self.options.exclude);
        let in_layers = self.options.layers.is_empty() || self.options.layers.contains(&layer);
        let targeted = match (&self.names, &self.pattern) {
            (Some(names), _) => named(names),
            (None, Some(pattern)) => pattern.is_match(path),
            (None, None) => true,
        };
        targeted && in_layers && !excluded
    }
}

fn is_or_ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn regex(key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|error| Fault::config(format!("LoraConfig.{key}: not a regular expression: {error}")))
}

/// `rank_pattern` and `alpha_pattern`: the key matches a path or its end after a dot.
fn patterns<T: Copy>(key: &str, entries: &[(String, T)]) -> Result<Vec<(Regex, T)>> {
    let compile =
        |(pattern, value): &(String, T)| Ok((regex(key, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, *value));
    entries.iter().map(compile).collect()
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(path)).map(|(_, value)| *value)
}

/// The flat buffers of all pairs.
#[derive(Clone, Debug)]
pub struct Trainable {
    pub sites: Vec<Site>,
    /// What the optimizer updates: f32 (f64 in tests).
    pub params: Tensor,
    pub grads: Tensor,
    /// What passes compute with: `params` itself, or its bf16 copy.
    pub compute: Tensor,
}

impl Trainable {
    /// A from the initialisation PEFT uses, B zero. Each site draws from its own stream of the seed, so that a
    /// site's values do not depend on which others are chosen.
    ///
    /// `dtype` is the activations'.
    pub fn init(
        sites: Vec<Site>,
        options: &LoraOptions,
        dtype: DType,
        device: &Device,
    ) -> TensorResult<Trainable> {
        let total = sites.iter().map(Site::parameters).sum::<usize>();
        let mut values = vec![0f32; total];
        for site in &sites {
            let a = &mut values[site.offset..][..site.rank * site.projection.cols];
            initialize(a, site, options);
        }
        let master = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let params = Tensor::from_vec(values, total, &Device::Cpu)?.to_dtype(master)?;
        let compute = if dtype == master { None } else { Some(params.to_dtype(dtype)?.to_device(device)?) };
        let params = params.to_device(device)?;
        let grads = params.zeros_like()?;
        Ok(Trainable { sites, grads, compute: compute.unwrap_or_else(|| params.clone()), params })
    }

    /// Brings the copy that passes compute with up to date with parameters that were read from a file.
    pub fn refresh(&self) -> TensorResult<()> {
        if self.compute.dtype() == self.params.dtype() {
            return Ok(());
        }
        flat::write(&self.compute, &self.params.to_device(&Device::Cpu)?.to_dtype(self.compute.dtype())?)
    }

    /// A [R, K] and B [N, R] of a site as views of one of the flat buffers.
    pub fn views(&self, flat: &Tensor, site: &Site) -> TensorResult<(Tensor, Tensor)> {
        let (rows, cols) = (site.projection.rows, site.projection.cols);
        let a = flat.narrow(0, site.offset, site.rank * cols)?.reshape((site.rank, cols))?;
        let b =
            flat.narrow(0, site.offset + site.rank * cols, rows * site.rank)?.reshape((rows, site.rank))?;
        Ok((a, b))
    }
}

/// Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(K); gaussian has deviation 1/r.
fn initialize(a: &mut [f32], site: &Site, options: &LoraOptions) {
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    random.set_stream(crate::ops::dropout::mix(fnv(&site.path)));
    let mut unit = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let bound = (site.projection.cols as f64).sqrt().recip();
    for value in a {
        *value = match options.init {
            LoraInit::Kaiming => (2.0 * unit() - 1.0) * bound,
            LoraInit::Gaussian => {
                let radius = (-2.0 * (1.0 - unit()).ln()).sqrt();
                radius * (std::f64::consts::TAU * unit()).cos() / site.rank as f64
            }
        } as f32;
    }
}

/// FNV-1a: a stable number for a path.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{config::Config, family};

    fn facts(family: &str) -> Facts {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family).join("model");
        family::describe(&Config::read(&path).unwrap()).unwrap()
    }

    fn options(targets: Targets) -> LoraOptions {
        LoraOptions { targets, ..LoraOptions::default() }
    }

    fn names(list: &[&str]) -> Targets {
        Targets::Names(list.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn a_list_matches_paths_and_suffixes_and_a_text_is_a_pattern() {
        let llama = facts("llama3");
        let count = |targets| sites(&llama, &options(targets)).unwrap().list.len();
        assert_eq!(count(Targets::AllLinear), 14);
        assert_eq!(count(names(&["q_proj", "v_proj"])), 4);
        assert_eq!(count(names(&["self_attn.q_proj", "model.layers.1.mlp.down_proj"])), 3);
        assert_eq!(count(Targets::Pattern(r".*\.0\..*_proj".into())), 7);
        let fault = sites(&llama, &options(names(&["proj", "qkv_proj"]))).unwrap_err();
        assert!(fault.message.contains("self_attn.q_proj"), "{fault}");
        let slip =
            LoraOptions { exclude: vec![".*up.*".into()], ..options(names(&["q_proj", "v_prj", "lm_head"])) };
        let unmatched = sites(&llama, &slip).unwrap().unmatched;
        assert_eq!(
            unmatched,
            [
                "LoraConfig.target_modules: v_prj",
                "LoraConfig.target_modules: lm_head",
                "LoraConfig.exclude_modules: .*up.*"
            ]
        );
        let some = LoraOptions {
            layers: vec![1],
            exclude: vec!["mlp.up_proj".into()],
            ..options(Targets::AllLinear)
        };
        assert_eq!(sites(&llama, &some).unwrap().list.len(), 6);
    }

    #[test]
    fn kaito_names_for_phi3_mean_the_fused_modules() {
        let kaito = names(&["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]);
        let found = sites(&facts("phi3"), &options(kaito)).unwrap();
        assert_eq!(found.list.len(), 8);
        assert_eq!(found.renamed.len(), 5);
    }

    #[test]
    fn patterns_set_rank_and_scale() {
        let options = LoraOptions {
            r: 4,
            alpha: 8.0,
            rslora: true,
            rank_pattern: vec![("down_proj".into(), 16), (r"0\.self_attn\.q_proj".into(), 2)],
            alpha_pattern: vec![("down_proj".into(), 32.0)],
            ..options(Targets::AllLinear)
        };
        let found = sites(&facts("llama3"), &options).unwrap().list;
        let site = |path: &str| found.iter().find(|site| site.path.ends_with(path)).unwrap();
        assert_eq!((site("0.mlp.down_proj").rank, site("0.mlp.down_proj").scale), (16, 8.0));
        assert_eq!((site("0.self_attn.q_proj").rank, site("1.self_attn.q_proj").rank), (2, 4));
        assert_eq!(site("1.self_attn.q_proj").scale, 4.0);
    }
}

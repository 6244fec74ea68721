//! PEFT's rules for which linear layers get a LoRA pair, and the place of each pair in the flat parameter buffer.

use std::ops::Range;

use fancy_regex::Regex;

use crate::fault::{Fault, Result};

use super::{Facts, LoraOptions, Matching, Modules, Projection, Targets, Tokens};

/// A linear layer that gets a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Index of the layer.
    pub layer: usize,
    /// Index of the linear layer among all of the model (`Facts::projections`).
    pub linear: usize,
    /// The linear layer.
    pub projection: Projection,
    /// Full path: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rank of the pair (r).
    pub rank: usize,
    /// Factor on the pair's output: alpha / r, or alpha / sqrt(r).
    pub scale: f64,
    /// Index of A's first element in the flat buffer; B follows A, and DoRA's magnitudes follow B.
    pub offset: usize,
    /// Whether the pair has DoRA's magnitudes, one for each row of the weight.
    pub dora: bool,
}

impl Site {
    /// Returns the number of parameters of A [r, K], B [N, r] and the magnitudes `[N]` together.
    pub fn parameters(&self) -> usize {
        let magnitudes = if self.dora { self.projection.rows } else { 0 };
        self.rank * (self.projection.rows + self.projection.cols) + magnitudes
    }

    /// Returns the places of A's and B's values in the flat buffer.
    pub fn matrices(&self) -> [Range<usize>; 2] {
        let middle = self.offset + self.rank * self.projection.cols;
        [self.offset..middle, middle..middle + self.rank * self.projection.rows]
    }

    /// Returns the place of DoRA's magnitudes in the flat buffer.
    pub fn magnitudes(&self) -> Option<Range<usize>> {
        let [_, b] = self.matrices();
        self.dora.then(|| b.end..b.end + self.projection.rows)
    }

    /// Returns the place of each trained tensor in the flat buffer.
    pub fn tensors(&self) -> impl Iterator<Item = Range<usize>> {
        self.matrices().into_iter().chain(self.magnitudes())
    }
}

/// A table of tokens of which some rows are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The embedding, and the output head if it is tied.
    Embedding,
    /// The output head.
    Head,
}

/// Trained rows of a table of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRows {
    /// The table.
    pub table: Table,
    /// Path of its module: `model.embed_tokens`.
    pub path: String,
    /// The tokens, in the order of their rows.
    pub ids: Vec<u32>,
    /// Values of a row.
    pub width: usize,
    /// Index of the first value in the flat buffer.
    pub offset: usize,
}

impl TokenRows {
    /// Returns the place of the values in the flat buffer.
    pub fn values(&self) -> Range<usize> {
        self.offset..self.offset + self.ids.len() * self.width
    }
}

/// Returns the lowest layer that the backward pass reaches: the lowest adapted one, or the first if rows of the
/// embedding are trained. `layers` if it reaches none.
pub fn lowest(sites: &[Site], tokens: &[TokenRows], layers: usize) -> usize {
    match tokens.iter().any(|rows| rows.table == Table::Embedding) {
        true => 0,
        false => sites.iter().map(|site| site.layer).min().unwrap_or(layers),
    }
}

/// The chosen sites, and the names that were understood as others or matched nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Sites {
    /// The sites in the order of computation.
    pub list: Vec<Site>,
    /// Trained rows of tables of tokens; their parameters stand before those of the pairs.
    pub tokens: Vec<TokenRows>,
    /// (name as written, module that holds it): `q_proj` -> `qkv_proj`.
    pub renamed: Vec<(String, String)>,
    /// Names in target_modules and exclude_modules that match nothing.
    pub unmatched: Vec<String>,
    /// Entries of layers_to_transform, rank_pattern and alpha_pattern that concern no adapted layer.
    pub idle: Vec<String>,
}

impl Sites {
    /// Warnings about what the configuration names and the model does not have.
    pub fn warnings(&self) -> Vec<String> {
        let unmatched =
            self.unmatched.iter().map(|name| format!("{name} matches no linear layer that can be adapted"));
        let idle =
            self.idle.iter().map(|entry| format!("{entry} has no effect: it matches no adapted layer"));
        unmatched.chain(idle).collect()
    }

    /// Returns the number of parameters of all pairs and of all trained rows of tokens.
    pub fn parameters(&self) -> usize {
        let rows = self.tokens.iter().map(|rows| rows.values().len()).sum::<usize>();
        self.list.iter().map(Site::parameters).sum::<usize>() + rows
    }
}

/// Chooses the sites among the decoder's projections. Invalid expressions and targets that match nothing are config
/// faults.
pub fn sites(facts: &Facts, options: &LoraOptions) -> Result<Sites> {
    let matcher = Matcher::new(facts, options)?;
    let ranks = Patterns::new("rank_pattern", &options.rank_pattern)?;
    let alphas = Patterns::new("alpha_pattern", &options.alpha_pattern)?;
    // The gradient of the embedding is known last, and is summed over ranks with the lowest layers'.
    let tokens = token_rows(facts, &options.tokens)?;
    let (mut list, mut offset) = (Vec::new(), tokens.last().map_or(0, |rows| rows.values().end));
    for (linear, (layer, projection)) in facts.projections().enumerate() {
        let path = facts.path(layer, projection);
        if !matcher.wants(layer, &path)? {
            continue;
        }
        let rank = ranks.first_match(&path)?.unwrap_or(options.r);
        let alpha = alphas.first_match(&path)?.unwrap_or(options.alpha);
        let divisor = if options.rslora { (rank as f64).sqrt() } else { rank as f64 };
        let (projection, scale) = (projection.clone(), alpha / divisor);
        let site = Site { layer, linear, projection, path, rank, scale, offset, dora: options.dora };
        offset += site.parameters();
        list.push(site);
    }
    if list.is_empty() {
        return Err(nothing_matches(facts, options));
    }
    let unmatched = matcher.unmatched(facts)?;
    let mut idle = idle_layers(&list, options);
    idle.extend(ranks.idle("rank_pattern", &list)?);
    idle.extend(alphas.idle("alpha_pattern", &list)?);
    Ok(Sites { list, tokens, renamed: matcher.renamed, unmatched, idle })
}

/// Returns layers that are to be adapted and have no adapted linear layer: most are beyond the model's last layer.
fn idle_layers(sites: &[Site], options: &LoraOptions) -> Vec<String> {
    let is_idle = |layer: &&usize| !sites.iter().any(|site| site.layer == **layer);
    let idle = options.layers.iter().filter(is_idle);
    idle.map(|layer| format!("LoraConfig.layers_to_transform: {layer}")).collect()
}

/// Returns the trained rows of tokens, at the beginning of the flat buffer.
fn token_rows(facts: &Facts, tokens: &Tokens) -> Result<Vec<TokenRows>> {
    if facts.tied_head && !tokens.head.is_empty() && tokens.head != tokens.embedding {
        return Err(Fault::config(
            "LoraConfig.trainable_token_indices: the output head is the embedding (tie_word_embeddings), so that both have \
             the same trained rows; found other tokens for the head",
        )
        .help("give one list of tokens: it counts for both"));
    }
    if facts.head_bias && !tokens.head.is_empty() {
        return Err(Fault::config(format!(
            "LoraConfig.trainable_token_indices: the output head of a {} model has a bias, which PEFT leaves out where rows \
             are trained",
            facts.family
        ))
        .help("train rows of the embedding only"));
    }
    let head = if facts.tied_head { &[] } else { tokens.head.as_slice() };
    let (mut list, mut offset) = (Vec::new(), 0);
    for (table, path, ids) in [
        (Table::Embedding, facts.embedding_path(), tokens.embedding.as_slice()),
        (Table::Head, facts.names.head.to_owned(), head),
    ] {
        if ids.is_empty() {
            continue;
        }
        check_tokens(facts, ids)?;
        let (ids, width) = (ids.to_vec(), facts.width);
        let rows = TokenRows { table, path, ids, width, offset };
        offset = rows.values().end;
        list.push(rows);
    }
    Ok(list)
}

fn check_tokens(facts: &Facts, ids: &[u32]) -> Result<()> {
    if let Some(id) = ids.iter().find(|id| **id as usize >= facts.vocab) {
        return Err(Fault::config(format!(
            "LoraConfig.trainable_token_indices: token {id}: the model has rows for tokens 0 to {}",
            facts.vocab - 1
        ))
        .help(
            "use tokens that the model reserves (many vocabularies have unused ones), and give them their text in \
             tokenizer.json; a larger table is not made",
        ));
    }
    let mut seen = std::collections::HashSet::new();
    match ids.iter().find(|id| !seen.insert(**id)) {
        Some(id) => {
            Err(Fault::config(format!("LoraConfig.trainable_token_indices: token {id} is named twice")))
        }
        None => Ok(()),
    }
}

fn nothing_matches(facts: &Facts, options: &LoraOptions) -> Fault {
    let known: Vec<&str> = facts.layers[0].projections().map(|p| p.path).collect();
    let narrowed = !options.layers.is_empty() || options.exclude != Modules::Names(Vec::new());
    let but = if narrowed { " (after layers_to_transform and exclude_modules)" } else { "" };
    Fault::config(format!(
        "LoraConfig.target_modules matches no linear layer of this {} model{but}; it has {} in layers 0 to {}",
        facts.family,
        known.join(", "),
        facts.layers.len() - 1
    ))
    .help("name some of these layers (the last part of a path is enough), or use \"all-linear\"")
}

/// PEFT's matching: a list matches whole paths or their ends after a dot; a text is a regular expression for the
/// whole path. Source: peft 0.21, `tuners_utils.check_target_module_exists`. PEFT refuses `layers_to_transform`
/// together with a text; hone lets it narrow the text's matches.
struct Matcher<'a> {
    options: &'a LoraOptions,
    /// `None` matches every linear layer.
    targets: Option<Test>,
    exclude: Test,
    /// `layers_pattern` as expressions whose group is the layer's index.
    layers: Vec<Regex>,
    renamed: Vec<(String, String)>,
}

enum Test {
    Names(Vec<String>),
    Pattern(Regex),
}

impl<'a> Matcher<'a> {
    fn new(facts: &Facts, options: &'a LoraOptions) -> Result<Matcher<'a>> {
        let mut renamed = Vec::new();
        let targets = match &options.targets {
            Targets::AllLinear => None,
            Targets::Modules(Modules::Names(names)) if options.matching == Matching::Fused => {
                Some(Test::Names(names.iter().map(|name| held_by(facts, name, &mut renamed)).collect()))
            }
            Targets::Modules(modules) => Some(Test::new("target_modules", modules)?),
        };
        let layer =
            |pattern: &String| regex("layers_pattern", &format!(r"^(?:|.*?\.)(?:{pattern})\.(\d+)\."));
        Ok(Matcher {
            options,
            targets,
            exclude: Test::new("exclude_modules", &options.exclude)?,
            layers: options.layers_pattern.iter().map(layer).collect::<Result<_>>()?,
            renamed,
        })
    }

    fn wants(&self, layer: usize, path: &str) -> Result<bool> {
        if self.exclude.matches(path)? {
            return Ok(false);
        }
        match &self.targets {
            // As in PEFT, a whole path selects that module regardless of layers_to_transform.
            Some(Test::Names(names)) if names.iter().any(|name| name == path) => Ok(true),
            Some(targets) if !targets.matches(path)? => Ok(false),
            _ => self.in_layers(layer, path),
        }
    }

    fn in_layers(&self, layer: usize, path: &str) -> Result<bool> {
        if self.options.layers.is_empty() {
            return Ok(true);
        }
        if self.layers.is_empty() {
            return Ok(self.options.layers.contains(&layer));
        }
        for pattern in &self.layers {
            if let Some(found) = pattern.captures(path).map_err(|error| too_hard(pattern, &error))? {
                let number = found.get(1).and_then(|number| number.as_str().parse().ok());
                return Ok(number.is_some_and(|number: usize| self.options.layers.contains(&number)));
            }
        }
        Ok(false)
    }

    /// Returns names that match no linear layer. Most are misspelt, and PEFT ignores them without a message.
    fn unmatched(&self, facts: &Facts) -> Result<Vec<String>> {
        let paths: Vec<String> =
            facts.projections().map(|(layer, projection)| facts.path(layer, projection)).collect();
        let mut list = Vec::new();
        for (key, test) in
            [("target_modules", self.targets.as_ref()), ("exclude_modules", Some(&self.exclude))]
        {
            match test {
                None => {}
                Some(Test::Names(names)) => {
                    let idle = |name: &&String| !paths.iter().any(|path| is_or_ends_with(path, name));
                    list.extend(names.iter().filter(idle).map(|name| format!("LoraConfig.{key}: {name}")));
                }
                Some(pattern @ Test::Pattern(regex)) => {
                    let found = paths.iter().map(|path| pattern.matches(path)).collect::<Result<Vec<_>>>()?;
                    if !found.contains(&true) {
                        list.push(format!("LoraConfig.{key}: {}", regex.as_str()));
                    }
                }
            }
        }
        Ok(list)
    }
}

/// Returns the module that holds `name`, and records names that are only a part of it.
fn held_by(facts: &Facts, name: &str, renamed: &mut Vec<(String, String)>) -> String {
    match facts.aliases.iter().find(|(split, _)| name == *split) {
        None => name.to_owned(),
        Some((_, fused)) => {
            renamed.push((name.to_owned(), (*fused).to_owned()));
            (*fused).to_owned()
        }
    }
}

impl Test {
    fn new(key: &str, modules: &Modules) -> Result<Test> {
        match modules {
            Modules::Names(names) => Ok(Test::Names(names.clone())),
            Modules::Pattern(text) => Ok(Test::Pattern(regex(key, &format!("^(?:{text})$"))?)),
        }
    }

    fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Test::Names(names) => Ok(names.iter().any(|name| is_or_ends_with(path, name))),
            Test::Pattern(pattern) => pattern.is_match(path).map_err(|error| too_hard(pattern, &error)),
        }
    }
}

fn is_or_ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Compiles an expression. Like Python's, this engine has look-around and back-references.
fn regex(key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|error| Fault::config(format!("LoraConfig.{key}: not a regular expression: {error}")))
}

/// Returns the fault for an expression that the engine gave up on: look-around may otherwise take unlimited time.
fn too_hard(pattern: &Regex, error: &fancy_regex::Error) -> Fault {
    Fault::config(format!("LoraConfig: the regular expression {} cannot be used: {error}", pattern.as_str()))
}

/// `rank_pattern` or `alpha_pattern`: a key matches a path or its end after a dot, and the first match wins.
struct Patterns<'a, T> {
    entries: &'a [(String, T)],
    compiled: Vec<Regex>,
}

impl<'a, T: Copy> Patterns<'a, T> {
    fn new(key: &str, entries: &'a [(String, T)]) -> Result<Patterns<'a, T>> {
        let compile = |(pattern, _): &(String, T)| regex(key, &format!(r"^(?:.*\.)?(?:{pattern})$"));
        Ok(Patterns { entries, compiled: entries.iter().map(compile).collect::<Result<_>>()? })
    }

    fn first_match(&self, path: &str) -> Result<Option<T>> {
        for (pattern, (_, value)) in self.compiled.iter().zip(self.entries) {
            if pattern.is_match(path).map_err(|error| too_hard(pattern, &error))? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Returns the entries that match no site.
    fn idle(&self, key: &str, sites: &[Site]) -> Result<Vec<String>> {
        let mut idle = Vec::new();
        for (pattern, (text, _)) in self.compiled.iter().zip(self.entries) {
            let matches = |site: &Site| pattern.is_match(&site.path);
            let found = sites.iter().map(matches).collect::<std::result::Result<Vec<_>, _>>();
            if !found.map_err(|error| too_hard(pattern, &error))?.contains(&true) {
                idle.push(format!("LoraConfig.{key}: {text}"));
            }
        }
        Ok(idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::config::Config;
    use crate::facts::family;
    use std::collections::BTreeSet;

    fn facts(family: &str) -> Facts {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family).join("model");
        family::describe(&Config::read(&path).unwrap()).unwrap()
    }

    fn pattern(text: &str) -> Targets {
        Targets::Modules(Modules::Pattern(text.into()))
    }

    fn options(targets: Targets) -> LoraOptions {
        LoraOptions { targets, ..LoraOptions::default() }
    }

    fn names(list: &[&str]) -> Targets {
        Targets::names(list.iter().copied())
    }

    #[test]
    fn a_list_matches_paths_and_suffixes_and_a_text_is_a_pattern() {
        let llama = facts("llama3");
        let count = |targets| sites(&llama, &options(targets)).unwrap().list.len();
        assert_eq!(count(Targets::AllLinear), 14);
        assert_eq!(count(names(&["q_proj", "v_proj"])), 4);
        assert_eq!(count(names(&["self_attn.q_proj", "model.layers.1.mlp.down_proj"])), 3);
        assert_eq!(count(pattern(r".*\.0\..*_proj")), 7);
        assert_eq!(count(pattern(r"model\.layers\.(?!0\.).*(?<!up)_proj")), 6, "look-around");
        let fault = sites(&llama, &options(names(&["proj", "qkv_proj"]))).unwrap_err();
        assert!(fault.message.contains("self_attn.q_proj"), "{fault}");
        let slip = LoraOptions {
            exclude: Modules::Names(vec![".*up.*".into()]),
            ..options(names(&["q_proj", "v_prj", "lm_head"]))
        };
        let unmatched = sites(&llama, &slip).unwrap().unmatched;
        assert_eq!(
            unmatched,
            [
                "LoraConfig.target_modules: v_prj",
                "LoraConfig.target_modules: lm_head",
                "LoraConfig.exclude_modules: .*up.*"
            ]
        );
        let beside = LoraOptions {
            layers: vec![1, 7],
            rank_pattern: vec![("q_proj".into(), 4), ("up_proj".into(), 4)],
            alpha_pattern: vec![("k_prj".into(), 4.0)],
            ..options(names(&["q_proj", "v_prj"]))
        };
        assert_eq!(
            sites(&llama, &beside).unwrap().warnings(),
            [
                "LoraConfig.target_modules: v_prj matches no linear layer that can be adapted",
                "LoraConfig.layers_to_transform: 7 has no effect: it matches no adapted layer",
                "LoraConfig.rank_pattern: up_proj has no effect: it matches no adapted layer",
                "LoraConfig.alpha_pattern: k_prj has no effect: it matches no adapted layer",
            ]
        );
        let some = LoraOptions {
            layers: vec![1],
            exclude: Modules::Names(vec!["mlp.up_proj".into()]),
            ..options(Targets::AllLinear)
        };
        assert_eq!(sites(&llama, &some).unwrap().list.len(), 6);
    }

    #[test]
    fn a_text_that_excludes_is_a_pattern() {
        let exclude = Modules::Pattern(r".*\.(up|gate)_proj".into());
        let found = sites(&facts("llama3"), &LoraOptions { exclude, ..options(Targets::AllLinear) }).unwrap();
        assert_eq!((found.list.len(), found.unmatched.len()), (10, 0));
        let exclude = Modules::Pattern("up_proj".into());
        let found = sites(&facts("llama3"), &LoraOptions { exclude, ..options(Targets::AllLinear) }).unwrap();
        assert_eq!((found.list.len(), found.unmatched.len()), (14, 1), "a pattern is for whole paths");
    }

    /// The cases follow `check_target_module_exists` of peft 0.21.
    #[test]
    fn layers_are_told_by_their_number_and_whole_paths_are_meant() {
        let llama = facts("llama3");
        let found = |targets: &[&str], layers: &[usize], patterns: &[&str]| {
            let options = LoraOptions {
                layers: layers.to_vec(),
                layers_pattern: patterns.iter().map(|pattern| pattern.to_string()).collect(),
                ..options(names(targets))
            };
            sites(&llama, &options)
                .map(|sites| sites.list.into_iter().map(|site| site.path).collect::<Vec<_>>())
        };
        let (first, second) = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj");
        assert_eq!(found(&["q_proj"], &[1], &[]).unwrap(), [second]);
        assert_eq!(found(&["q_proj"], &[1], &["layers"]).unwrap(), [second]);
        assert_eq!(found(&["q_proj"], &[0], &["h", "model.layers"]).unwrap(), [first]);
        assert_eq!(found(&[first, "q_proj"], &[1], &[]).unwrap(), [first, second]);
        let fault = found(&["q_proj"], &[1], &["h"]).unwrap_err();
        assert!(fault.message.contains("after layers_to_transform"), "{fault}");
        assert!(found(&["q_proj"], &[2], &[]).is_err(), "there are two layers");
    }

    #[test]
    fn kaito_names_for_phi3_mean_the_fused_modules() {
        let kaito = names(&["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]);
        let found = sites(&facts("phi3"), &options(kaito.clone())).unwrap();
        assert_eq!(found.list.len(), 8);
        assert_eq!(found.renamed.len(), 5);
        let literal = LoraOptions { matching: Matching::Literal, ..options(kaito) };
        let found = sites(&facts("phi3"), &literal).unwrap();
        let ends: BTreeSet<&str> = found.list.iter().map(|site| site.projection.path).collect();
        assert_eq!(ends, BTreeSet::from(["self_attn.o_proj", "mlp.down_proj"]));
        assert_eq!((found.renamed.len(), found.unmatched.len()), (0, 5));
    }

    #[test]
    fn trained_rows_stand_before_the_pairs_and_belong_to_a_table() {
        let with = |family: &str, embedding: &[u32], head: &[u32]| {
            let tokens = Tokens { embedding: embedding.to_vec(), head: head.to_vec() };
            sites(&facts(family), &LoraOptions { tokens, ..options(Targets::AllLinear) })
        };
        let untied = with("llama3", &[5, 3], &[5]).unwrap();
        let pairs: usize = untied.list.iter().map(Site::parameters).sum();
        let found: Vec<(Table, &str, Range<usize>)> =
            untied.tokens.iter().map(|rows| (rows.table, rows.path.as_str(), rows.values())).collect();
        let width = facts("llama3").width;
        let (middle, end) = (2 * width, 3 * width);
        assert_eq!(
            found,
            [(Table::Embedding, "model.embed_tokens", 0..middle), (Table::Head, "lm_head", middle..end)]
        );
        assert_eq!((untied.list[0].offset, untied.parameters()), (end, end + pairs));
        assert_eq!(lowest(&[], &untied.tokens, 9), 0);
        assert_eq!(lowest(&[], &untied.tokens[1..], 9), 9);
        let tied = with("qwen2_tied", &[5, 3], &[5, 3]).unwrap().tokens;
        assert_eq!((tied.len(), tied[0].table), (1, Table::Embedding));
        let wrapped = with("gemma3_wrapper", &[5], &[]).unwrap().tokens;
        assert_eq!(wrapped[0].path, "model.language_model.embed_tokens");
        let refused = |family: &str, embedding: &[u32], head: &[u32]| {
            with(family, embedding, head).unwrap_err().message
        };
        assert!(refused("qwen2_tied", &[5], &[3]).contains("the output head is the embedding"));
        assert!(refused("phi2", &[], &[3]).contains("has a bias"));
        assert!(refused("llama3", &[3, 4, 3], &[]).contains("token 3 is named twice"));
        assert!(refused("llama3", &[1 << 20], &[]).contains("the model has rows for tokens 0 to"));
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

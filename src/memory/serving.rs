//! Facts, adapters and available memory -> the number of tokens whose keys and values a server keeps. If a single
//! request does not fit, the fault gives the numbers.
//!
//! A server needs the weights, its adapters, the memory of a step, and the cache, which takes the rest. A step has one
//! row of every sequence that generates, and at most two chunks of prompts.

use serde_json::{Value as Json, json};

use super::machine::{Machine, Place};
use super::task::Task;
use super::{card, terms};
use crate::facts::{Facts, LayerFacts, Precision, Quantization};
use crate::fault::{Fault, Result};
use crate::model::filled::{self, SPARE_PAGES};
use crate::model::layer;
use crate::ops::attention::cached::PAGE;
use crate::words::size;

use super::terms::{Layers, Term};

/// Buffers of connections, bodies of requests, tokenizer, and freed memory that the allocator keeps.
const PROCESS_BYTES: u64 = 256 << 20;
/// Query rows of one task of attention on a CPU.
const ATTENTION_ROWS: usize = 64;

/// The type of keys and values in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// Two bytes for each value.
    #[default]
    Bf16,
    /// Four bytes for each value.
    F32,
    /// One byte for each value, an E4M3 number.
    Fp8,
}

impl CacheType {
    /// Returns the bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            CacheType::Bf16 => 2,
            CacheType::F32 => 4,
            CacheType::Fp8 => 1,
        }
    }

    /// Returns the name in flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::Bf16 => "bf16",
            CacheType::F32 => "f32",
            CacheType::Fp8 => "fp8",
        }
    }

    /// Reads the value of `--cache-type`.
    ///
    /// # Errors
    /// The name is not known; the message lists the names.
    pub fn parse(text: &str) -> std::result::Result<CacheType, String> {
        match text {
            "bf16" => Ok(CacheType::Bf16),
            "f32" => Ok(CacheType::F32),
            "fp8" | "fp8_e4m3" => Ok(CacheType::Fp8),
            "q8" | "q8_0" | "int8" | "fp8_e5m2" => {
                Err(format!("{text} is not supported: keys and values are kept in bf16, f32 or fp8 (E4M3)"))
            }
            _ => Err("expected bf16, f32 or fp8".into()),
        }
    }
}

/// The model and the adapters that are to be served, as far as memory depends on them.
#[derive(Clone, Debug)]
pub struct Served {
    /// The model.
    pub facts: Facts,
    /// The storage of linear layers.
    pub quantization: Quantization,
    /// Precision of products.
    pub precision: Precision,
    /// Whether the checkpoint's weights are bf16.
    pub bf16_checkpoint: bool,
    /// Bytes of the adapters as they are held.
    pub adapters: u64,
    /// Most rows of prompts in one step.
    pub prompt_rows: usize,
    /// Most sequences that run at once.
    pub sequences: usize,
    /// Most tokens of prompt and answer together. `None`: the length that the model was made for, as far as it fits.
    pub context: Option<usize>,
    /// Tokens of the cache; `None`: as many as fit, up to all sequences of the whole context.
    pub cache_tokens: Option<usize>,
    /// The type of keys and values in the cache.
    pub cache: CacheType,
}

/// The memory of a server, by use.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Most tokens of one request.
    pub context: usize,
    /// Tokens whose keys and values are kept, over all sequences.
    pub cache_tokens: usize,
    /// Tokens of the cache that would fit.
    pub fits: usize,
    /// The bytes of one token, in all layers.
    pub token_bytes: u64,
    /// Everything that takes memory, in the table's order.
    pub terms: Vec<Term>,
    /// The memory of the machine that it is for.
    pub memory: u64,
    /// The type of keys and values in the cache.
    pub cache: CacheType,
}

/// Returns the number of bytes of keys and values of one token in all layers.
pub fn token_bytes(facts: &Facts, cache: CacheType) -> u64 {
    let layer =
        |layer: &LayerFacts| 2 * layer.attention.heads.key * layer.attention.heads.width * cache.bytes();
    facts.layers.iter().map(layer).sum::<usize>() as u64
}

/// Divides the machine's memory.
///
/// # Errors
/// Config: a context beyond the model's. Capacity: not even one request of the context fits, or the cache that was
/// asked for does not.
pub fn solve(served: &Served, machine: &Machine) -> Result<Plan> {
    let most = served.facts.positions_max;
    if let Some(context) = served.context.filter(|context| *context > most) {
        return Err(Fault::config(format!("--context {context}: the model was made for {most} tokens"))
            .help(format!("give at most {most}")));
    }
    let solver = Solver { served, machine, token_bytes: token_bytes(&served.facts, served.cache) };
    let fits = solver.fits();
    let asked = served.cache_tokens.map(|tokens| tokens.div_ceil(PAGE) * PAGE);
    if let Some(tokens) = asked.filter(|tokens| *tokens > fits) {
        return Err(solver.refusal(tokens, fits, "--cache-tokens"));
    }
    let least = served.context.unwrap_or(PAGE);
    let room = asked.unwrap_or(fits);
    if room < least {
        return Err(match asked {
            Some(tokens) => Fault::config(format!(
                "--cache-tokens {tokens}: a request of the context's {least} tokens does not fit into it"
            ))
            .help("lower --context, or raise --cache-tokens"),
            None => solver.refusal(least, fits, "--context"),
        });
    }
    let context = served.context.unwrap_or(most.min(room));
    let all = served.sequences.max(1).saturating_mul(context).div_ceil(PAGE) * PAGE;
    let cache_tokens = asked.unwrap_or(all.min(fits));
    Ok(Plan {
        context,
        cache_tokens,
        fits,
        token_bytes: solver.token_bytes,
        terms: solver.terms(cache_tokens, context),
        memory: machine.memory,
        cache: served.cache,
    })
}

struct Solver<'a> {
    served: &'a Served,
    machine: &'a Machine,
    token_bytes: u64,
}

impl Solver<'_> {
    /// Returns the whole pages that fit, in tokens.
    fn fits(&self) -> usize {
        let most = self.served.facts.positions_max;
        let context = |tokens: usize| self.served.context.unwrap_or(most).min(tokens.max(1));
        let fit = |pages: usize| {
            let tokens = pages * PAGE;
            self.terms(tokens, context(tokens)).iter().map(|term| term.bytes).sum::<u64>()
                <= self.machine.memory
        };
        let page_bytes = (self.token_bytes * PAGE as u64).max(1);
        let (mut low, mut high) = (0, (self.machine.memory / page_bytes) as usize + 1);
        if !fit(0) {
            return 0;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fit(middle) { low = middle } else { high = middle }
        }
        low * PAGE
    }

    fn terms(&self, cache_tokens: usize, context: usize) -> Vec<Term> {
        let place = self.machine.place;
        let task = self.task();
        let term = |what: String, bytes: u64| Term { what, bytes };
        let mut terms = terms::weights(&task, place, Layers::RESIDENT);
        if self.machine.taken > 0 {
            terms.insert(0, term("context and kernels".into(), self.machine.taken));
        }
        terms.push(term("adapters".into(), self.served.adapters));
        terms.extend(terms::workspace(&task, place, 0));
        terms.push(term("a step's activations".into(), self.activations(&task)));
        terms.push(term("a step's logits".into(), self.logits()));
        if let Place::Cpu { threads } = place {
            let group = self.served.facts.layers.iter().map(|layer| layer.attention.heads.group()).max();
            let scores = ATTENTION_ROWS * group.unwrap_or(1) * context.div_ceil(PAGE) * PAGE * 4;
            terms.push(term(format!("attention scores, {threads} threads"), (threads * scores) as u64));
        }
        if place == Place::Gpu {
            let spare = (SPARE_PAGES * PAGE) as u64 * self.token_bytes;
            let graphs = filled::bytes(&self.served.facts, self.served.sequences);
            terms.push(term("graphs of steps".into(), graphs + spare));
        }
        terms.push(term("process, connections and requests".into(), PROCESS_BYTES));
        let what = format!("keys and values of {cache_tokens} tokens ({})", self.served.cache.name());
        terms.push(term(what, cache_tokens as u64 * self.token_bytes));
        terms.retain(|term| term.bytes > 0);
        terms
    }

    fn task(&self) -> Task {
        Task {
            facts: self.served.facts.clone(),
            sites: Vec::new(),
            tokens: Vec::new(),
            quantization: self.served.quantization,
            precision: self.served.precision,
            dropout: false,
            bf16_checkpoint: self.served.bf16_checkpoint,
            tokens_min: 1,
            tokens_max: self.rows(),
            example_tokens: 1,
            eight_bit_moments: false,
            keep: None,
            residency: None,
        }
    }

    /// Returns the number of rows of the largest step.
    fn rows(&self) -> usize {
        self.served.sequences.max(1) + self.served.prompt_rows
    }

    /// Returns the bytes of a layer's forward pass in its widest moment.
    fn activations(&self, task: &Task) -> u64 {
        let facts = &self.served.facts;
        let layers = 0..facts.layers.len();
        let widest = layers.map(|layer| layer::step_values(facts, layer)).max().unwrap_or(0);
        (self.rows() * widest * task.activation_bytes(self.machine.place)) as u64
    }

    /// Returns the bytes of logits on the device, and on the host as f32: of every row if the prompts are scored.
    fn logits(&self) -> u64 {
        (2 * self.rows() * self.served.facts.vocab * 4) as u64
    }

    fn refusal(&self, tokens: usize, fits: usize, flag: &str) -> Fault {
        let terms = self.terms(tokens, self.served.context.unwrap_or(tokens));
        let needed: u64 = terms.iter().map(|term| term.bytes).sum();
        let mut list: Vec<&Term> = terms.iter().collect();
        list.sort_by_key(|term| std::cmp::Reverse(term.bytes));
        let list: Vec<String> =
            list.iter().map(|term| format!("{} {}", term.what, size(term.bytes))).collect();
        let mut help = Vec::new();
        if fits >= PAGE {
            help.push(format!("{flag} {fits} would fit"));
        }
        if self.served.cache == CacheType::F32 {
            help.push("--cache-type bf16 takes half".into());
        }
        if self.served.sequences > 1 && fits < PAGE {
            help.push("lower --sequences".into());
        }
        if self.served.quantization == Quantization::None {
            help.push("set QuantizationConfig.load_in_4bit".into());
        }
        let larger = card::at_least(needed).next();
        match (self.machine.place, larger) {
            (Place::Cpu { .. }, _) => help.push(format!("give the process {} of memory", size(needed))),
            (Place::Gpu, Some(card)) => help.push(format!("take a larger card: {} would do", card.name)),
            (Place::Gpu, None) => help.push("no card in hone's table is large enough".into()),
        }
        Fault::capacity(format!(
            "serving needs at least {}, but only {} can be used on {}: {}",
            size(needed),
            size(self.machine.memory),
            self.machine.name,
            list.join(", ")
        ))
        .help(help.join("; "))
    }
}

impl Plan {
    /// Returns the sum of all terms.
    pub fn bytes(&self) -> u64 {
        self.terms.iter().map(|term| term.bytes).sum()
    }

    /// Returns a line such as `context 4096 tokens; the cache holds 65536 tokens of 384 KiB each, and 70000 would fit`.
    pub fn choice(&self) -> String {
        format!(
            "context {} tokens; the cache holds {} tokens of {} each, and {} would fit",
            self.context,
            self.cache_tokens,
            size(self.token_bytes),
            self.fits
        )
    }

    /// Returns the table: one line for each term, the sum, and the chosen sizes.
    pub fn table(&self, machine: &Machine) -> String {
        let wide = self.terms.iter().map(|term| term.what.len()).max().unwrap_or(0).max(8);
        let line = |what: &str, bytes: u64| format!("{what:<wide$}  {:>10}\n", size(bytes));
        let mut table: String = self.terms.iter().map(|term| line(&term.what, term.bytes)).collect();
        table += &line("in all", self.bytes());
        table += &line(&format!("usable on {}", machine.name), self.memory);
        table + &format!("{}\n", self.choice())
    }

    /// Returns `{"machine", "terms": {what: bytes}, "bytes", "memory", "context", "cache_tokens", "cache_tokens_fit",
    /// "token_bytes", "cache_type"}`.
    pub fn json(&self, machine: &Machine) -> Json {
        let terms: serde_json::Map<String, Json> =
            self.terms.iter().map(|term| (term.what.clone(), term.bytes.into())).collect();
        json!({
            "machine": machine.name, "terms": terms, "bytes": self.bytes(), "memory": self.memory,
            "context": self.context, "cache_tokens": self.cache_tokens, "cache_tokens_fit": self.fits,
            "token_bytes": self.token_bytes, "cache_type": self.cache.name(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{FourBitCode, shapes};
    use crate::fault::Kind;

    fn served(shape: &str) -> Served {
        Served {
            facts: shapes::facts(shape).unwrap(),
            quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
            precision: Precision::Bf16,
            bf16_checkpoint: true,
            adapters: 50 << 20,
            prompt_rows: 512,
            sequences: 16,
            context: None,
            cache_tokens: None,
            cache: CacheType::Bf16,
        }
    }

    fn machine(card: &str) -> Machine {
        card::find(card).unwrap().0.machine(None).unwrap()
    }

    fn phi3() -> Served {
        served("phi3-mini")
    }

    #[test]
    fn the_cache_takes_what_the_weights_leave() {
        let served = phi3();
        // 32 layers, 32 key heads of 96: two of 2 bytes each.
        assert_eq!(token_bytes(&served.facts, CacheType::Bf16), 32 * 2 * 32 * 96 * 2);
        let (small, large) =
            (solve(&served, &machine("l4")).unwrap(), solve(&served, &machine("h100")).unwrap());
        for plan in [&small, &large] {
            assert!(plan.bytes() <= plan.memory, "{plan:?}");
            assert_eq!(plan.cache_tokens % PAGE, 0);
            assert_eq!(plan.context, served.facts.positions_max.min(plan.fits));
        }
        assert!(large.fits > 3 * small.fits, "{} {}", large.fits, small.fits);
        // One page more does not fit.
        let more = Served { cache_tokens: Some(small.fits + PAGE), ..served.clone() };
        let fault = solve(&more, &machine("l4")).unwrap_err();
        assert_eq!(fault.kind, Kind::Capacity);
        assert!(fault.to_string().contains(&format!("--cache-tokens {} would fit", small.fits)), "{fault}");
        let most = Served { cache_tokens: Some(small.fits), ..served };
        assert_eq!(solve(&most, &machine("l4")).unwrap().cache_tokens, small.fits);
    }

    #[test]
    fn f32_halves_and_fp8_doubles_what_fits_and_too_little_memory_is_refused_with_numbers() {
        let served = phi3();
        let wide = Served { cache: CacheType::F32, ..served.clone() };
        let (half, whole) = (solve(&wide, &machine("l4")).unwrap(), solve(&served, &machine("l4")).unwrap());
        assert!(half.fits.abs_diff(whole.fits / 2) <= PAGE, "{} {}", half.fits, whole.fits);
        let tight = Machine { memory: 4 << 30, ..machine("l4") };
        let plan = solve(&served, &tight).unwrap();
        assert!(plan.context < served.facts.positions_max && plan.bytes() <= tight.memory, "{plan:?}");
        let asked = Served { context: Some(served.facts.positions_max), ..served.clone() };
        let fault = solve(&asked, &tight).unwrap_err();
        assert_eq!(fault.kind, Kind::Capacity);
        assert!(fault.to_string().contains("can be used on l4"), "{fault}");
        let eight = solve(&Served { cache: CacheType::Fp8, ..served.clone() }, &machine("l4")).unwrap();
        assert!(eight.fits.abs_diff(2 * whole.fits) <= 2 * PAGE, "{} {}", eight.fits, whole.fits);
        let none = Machine { memory: 1 << 30, ..machine("l4") };
        let fault = solve(&served, &none).unwrap_err();
        assert!(fault.message.contains("serving needs at least"), "{fault}");
        let beyond = Served { context: Some(1 << 30), ..served };
        assert!(solve(&beyond, &machine("l4")).unwrap_err().message.contains("the model was made for"));
    }

    #[test]
    fn other_8_bit_caches_are_refused_by_name() {
        assert!(CacheType::parse("q8").unwrap_err().contains("q8 is not supported"));
        for cache in [CacheType::Bf16, CacheType::F32, CacheType::Fp8] {
            assert_eq!(CacheType::parse(cache.name()), Ok(cache));
        }
    }
}

//! Requests and the engine's counters -> Prometheus text under vLLM's names.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Instant;

use super::model::Model;
use crate::generate::Usage;

/// Borders of times in seconds.
const SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0, 960.0];
/// Borders of counts of tokens.
const TOKENS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 50000.0];

#[derive(Clone, Debug, Default)]
struct Histogram {
    /// For each border those at or below it and above the one before; the last is above all.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    fn add(&mut self, borders: &[f64], value: f64) {
        self.counts.resize(borders.len() + 1, 0);
        let place = borders.iter().position(|border| value <= *border).unwrap_or(borders.len());
        self.counts[place] += 1;
        self.sum += value;
    }
}

#[derive(Debug, Default)]
struct Numbers {
    finished: BTreeMap<&'static str, u64>,
    rejected: u64,
    first_token: Histogram,
    each_token: Histogram,
    whole: Histogram,
    prompt: Histogram,
    generated: Histogram,
}

/// What requests took; written when they end.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Numbers>);

/// Times of one choice.
#[derive(Clone, Debug)]
pub struct Clock {
    begun: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: usize,
}

impl Clock {
    /// So many tokens came now.
    pub fn tokens(&mut self, count: usize) {
        if count > 0 {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.tokens += count;
        }
    }
}

impl Metrics {
    pub fn clock(&self, begun: Instant) -> Clock {
        Clock { begun, first: None, last: None, tokens: 0 }
    }

    /// A request was refused since too many wait.
    pub fn rejected(&self) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).rejected += 1;
    }

    /// A choice ended.
    pub fn ended(&self, reason: &'static str, usage: &Usage, clock: &Clock) {
        let mut numbers = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *numbers.finished.entry(reason).or_default() += 1;
        if let Some(first) = clock.first {
            numbers.first_token.add(&SECONDS, (first - clock.begun).as_secs_f64());
        }
        if let (Some(first), Some(last), 2..) = (clock.first, clock.last, clock.tokens) {
            let each = (last - first).as_secs_f64() / (clock.tokens - 1) as f64;
            numbers.each_token.add(&SECONDS, each);
        }
        if !matches!(reason, "error" | "abort") {
            numbers.whole.add(&SECONDS, clock.begun.elapsed().as_secs_f64());
            numbers.prompt.add(&TOKENS, usage.prompt_tokens as f64);
            numbers.generated.add(&TOKENS, usage.generated_tokens as f64);
        }
    }

    /// All of it; the engine's part only once it is there.
    pub fn text(&self, model: Option<&Model>) -> String {
        let name = model.map_or("", |model| model.name.as_str());
        let labels = format!("engine=\"0\",model_name=\"{}\"", escaped(name));
        let mut page = Page { text: String::new(), labels };
        if let Some(model) = model {
            page.engine(model);
        }
        let numbers = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        page.head("vllm:request_success_total", "counter", "Requests that were finished.");
        for reason in ["stop", "length", "abort", "error"] {
            let count = numbers.finished.get(reason).copied().unwrap_or(0);
            page.value("vllm:request_success_total", &format!(",finished_reason=\"{reason}\""), count as f64);
        }
        page.one(
            "hone_requests_rejected_total",
            "counter",
            "Requests refused with 429.",
            numbers.rejected as f64,
        );
        let list = [
            ("time_to_first_token_seconds", "Time to the first token.", &SECONDS[..], &numbers.first_token),
            ("time_per_output_token_seconds", "Time of each further token.", &SECONDS, &numbers.each_token),
            ("inter_token_latency_seconds", "Time of each further token.", &SECONDS, &numbers.each_token),
            ("e2e_request_latency_seconds", "Time of a whole request.", &SECONDS, &numbers.whole),
            ("request_prompt_tokens", "Tokens of a prompt.", &TOKENS, &numbers.prompt),
            ("request_generation_tokens", "Tokens of an answer.", &TOKENS, &numbers.generated),
        ];
        for (name, help, borders, histogram) in list {
            page.histogram(&format!("vllm:{name}"), help, borders, histogram);
        }
        page.text
    }
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn engine(&mut self, model: &Model) {
        let counters = model.engine.counters();
        let list = [
            ("num_requests_running", "gauge", "Sequences in the batch.", counters.running as f64),
            ("num_requests_waiting", "gauge", "Requests that wait.", counters.waiting as f64),
            ("kv_cache_usage_perc", "gauge", "Pages of the cache in use; 1 is all.", counters.cache_usage),
            ("gpu_cache_usage_perc", "gauge", "The same under its older name.", counters.cache_usage),
            (
                "prefix_cache_queries_total",
                "counter",
                "Prompt tokens looked up.",
                counters.prefix_queries as f64,
            ),
            ("prefix_cache_hits_total", "counter", "Prompt tokens found.", counters.prefix_hits as f64),
            ("prompt_tokens_total", "counter", "Prompt tokens computed.", counters.prompt_tokens as f64),
            ("generation_tokens_total", "counter", "Tokens generated.", counters.generated_tokens as f64),
            ("num_preemptions_total", "counter", "Sequences that started over.", counters.preemptions as f64),
        ];
        for (name, kind, help, value) in list {
            self.one(&format!("vllm:{name}"), kind, help, value);
        }
        let help = "Requests whose clients went away.";
        self.one("hone_requests_cancelled_total", "counter", help, counters.cancelled as f64);
        let adapters = model.engine.adapters();
        let bytes: usize = adapters.iter().map(|adapter| adapter.bytes).sum();
        self.one("hone_adapter_bytes", "gauge", "Memory of the loaded adapters.", bytes as f64);
        let names: Vec<String> = adapters.iter().map(|adapter| escaped(&adapter.name)).collect();
        self.head("vllm:lora_requests_info", "gauge", "Adapters that are loaded.");
        let label = format!(
            ",max_lora=\"{}\",waiting_lora_adapters=\"\",running_lora_adapters=\"{}\"",
            names.len(),
            names.join(",")
        );
        self.value("vllm:lora_requests_info", &label, 1.0);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn value(&mut self, name: &str, more: &str, value: f64) {
        let _ = writeln!(self.text, "{name}{{{}{more}}} {value}", self.labels);
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.value(name, "", value);
    }

    fn histogram(&mut self, name: &str, help: &str, borders: &[f64], histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut sum = 0;
        for (place, border) in borders.iter().enumerate() {
            sum += histogram.counts.get(place).copied().unwrap_or(0);
            self.value(&format!("{name}_bucket"), &format!(",le=\"{border}\""), sum as f64);
        }
        sum += histogram.counts.get(borders.len()).copied().unwrap_or(0);
        self.value(&format!("{name}_bucket"), ",le=\"+Inf\"", sum as f64);
        self.value(&format!("{name}_sum"), "", histogram.sum);
        self.value(&format!("{name}_count"), "", sum as f64);
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

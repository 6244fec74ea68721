//! Requests and the engine's counters -> Prometheus text under vLLM's names.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::ask::Ask;
use super::model::Model;
use crate::generate::Usage;
use crate::ops::attention::cached::PAGE;

/// Borders of times in seconds.
const SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0, 960.0];
/// Borders of counts of tokens.
const TOKENS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 50000.0];

#[derive(Clone, Debug, Default)]
struct Histogram {
    /// The count between each border and the one before it, the border included. The last count is above all borders.
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
    /// Requests being answered, by adapter.
    in_use: BTreeMap<String, usize>,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    asked: Histogram,
    choices: Histogram,
    first_token: Histogram,
    each_token: Histogram,
    whole: Histogram,
    prompt: Histogram,
    generated: Histogram,
}

/// Whether prompts share pages.
const PREFIXES: bool = true;
/// Borders of counts of choices.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// The times of requests; written when they end.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Numbers>);

/// Times of one choice. One that is dropped before its end was aborted.
pub struct Clock {
    metrics: Arc<Metrics>,
    ended: bool,
    begun: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: usize,
}

/// The adapters of a request while it is answered.
pub struct InUse {
    names: Vec<String>,
    metrics: Arc<Metrics>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut numbers = self.metrics.lock();
        for name in &self.names {
            if let Some(count) = numbers.in_use.get_mut(name) {
                *count -= 1;
            }
        }
        numbers.in_use.retain(|_, count| *count > 0);
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if !self.ended {
            self.metrics.count("abort", &Usage::default(), self);
        }
    }
}

impl Clock {
    /// Records that the choice left the queue.
    pub fn started(&mut self) {
        self.started = Some(Instant::now());
    }

    /// Records that `count` tokens came now.
    pub fn tokens(&mut self, count: usize) {
        if count > 0 {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.tokens += count;
        }
    }

    /// The choice ended.
    pub fn ended(&mut self, reason: &'static str, usage: &Usage) {
        self.ended = true;
        self.metrics.count(reason, usage, self);
    }
}

impl Metrics {
    /// The clock of a choice whose request came at `begun`.
    pub fn clock(self: &Arc<Metrics>, begun: Instant) -> Clock {
        Clock {
            metrics: self.clone(),
            ended: false,
            begun,
            started: None,
            first: None,
            last: None,
            tokens: 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request that begins. Its adapters are in use until the result is dropped.
    pub fn uses(self: &Arc<Metrics>, ask: &Ask) -> InUse {
        let names: Vec<String> = ask.request.adapters.iter().map(|part| part.name.clone()).collect();
        let mut numbers = self.lock();
        for name in &names {
            *numbers.in_use.entry(name.clone()).or_default() += 1;
        }
        numbers.asked.add(&TOKENS, ask.request.max_tokens as f64);
        numbers.choices.add(&CHOICES, ask.n as f64);
        drop(numbers);
        InUse { names, metrics: self.clone() }
    }

    /// Counts a request that was refused because too many wait.
    pub fn rejected(&self) {
        self.lock().rejected += 1;
    }

    fn count(&self, reason: &'static str, usage: &Usage, clock: &Clock) {
        let mut numbers = self.lock();
        *numbers.finished.entry(reason).or_default() += 1;
        if let Some(first) = clock.first {
            numbers.first_token.add(&SECONDS, (first - clock.begun).as_secs_f64());
        }
        let end = Instant::now();
        if let Some(started) = clock.started {
            numbers.queue.add(&SECONDS, (started - clock.begun).as_secs_f64());
            numbers.inference.add(&SECONDS, (end - started).as_secs_f64());
            if let Some(first) = clock.first {
                numbers.prefill.add(&SECONDS, first.saturating_duration_since(started).as_secs_f64());
                numbers.decode.add(&SECONDS, (end - first).as_secs_f64());
            }
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

    /// Returns all metrics; the engine's only once there is an engine.
    pub fn text(&self, model: Option<&Model>) -> String {
        let name = model.map_or("", |model| model.name.as_str());
        let labels = format!("engine=\"0\",model_name=\"{}\"", escaped(name));
        let mut page = Page { text: String::new(), labels };
        if let Some(model) = model {
            page.engine(model);
        }
        let numbers = self.lock();
        page.adapters(&numbers.in_use, model);
        page.head("vllm:request_success_total", "counter", "Requests that were finished.");
        for reason in ["stop", "length", "tool_calls", "abort", "error"] {
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
            ("request_queue_time_seconds", "Time in the queue.", &SECONDS, &numbers.queue),
            ("request_inference_time_seconds", "Time behind the queue.", &SECONDS, &numbers.inference),
            (
                "request_prefill_time_seconds",
                "Time from the queue to the first token.",
                &SECONDS,
                &numbers.prefill,
            ),
            (
                "request_decode_time_seconds",
                "Time from the first token to the end.",
                &SECONDS,
                &numbers.decode,
            ),
            ("request_params_max_tokens", "Tokens asked for.", &TOKENS, &numbers.asked),
            ("request_params_n", "Choices asked for.", &CHOICES, &numbers.choices),
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
        self.head("vllm:cache_config_info", "gauge", "How the cache is laid out.");
        let pages = model.engine.facts().cache_tokens / PAGE;
        let label =
            format!(",block_size=\"{PAGE}\",num_gpu_blocks=\"{pages}\",enable_prefix_caching=\"{PREFIXES}\"");
        self.value("vllm:cache_config_info", &label, 1.0);
    }

    /// Writes vLLM's metric about adapters: those of requests that are being answered, and the number of loaded ones.
    fn adapters(&mut self, in_use: &BTreeMap<String, usize>, model: Option<&Model>) {
        let names: Vec<String> = in_use.keys().map(|name| escaped(name)).collect();
        let loaded = model.map_or(0, |model| model.engine.adapters().len());
        self.head("vllm:lora_requests_info", "gauge", "Adapters of requests that are being answered.");
        let label = format!(
            ",max_lora=\"{loaded}\",waiting_lora_adapters=\"\",running_lora_adapters=\"{}\"",
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

//! Data of any size through the token cache: rows, tokens/s, peak memory, and the same again from the cache, as one
//! JSON line.
//!
//! `python benches/data.py make FOLDER --gigabytes 2.5`, then
//! `cargo bench --bench data -- FOLDER [--tokens-max 1024] [--epoch]`. `--epoch` also reads each example once in a
//! random order, as training does. `benches/data.py reference FOLDER` is Hugging Face's side.

use std::path::PathBuf;
use std::time::Instant;

use hone::dataset::{self, LossOn, Options, Prepared, TokenCache, TokenOptions, Tokenizer, prepare};
use hone::report::Report;
use hone::train::order::{self, Steps};
use hone::{machine, source, train};

fn main() {
    machine::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let folder = PathBuf::from(arguments.first().expect("the folder that data.py made"));
    let after = |name: &str| arguments.iter().skip_while(move |argument| *argument != name).nth(1);
    let tokens_max = after("--tokens-max").map_or(1024, |text| text.parse().expect("a whole number"));
    let path = folder.join("rows.parquet");
    let began = Instant::now();
    let bytes = std::fs::metadata(&path).expect("rows.parquet").len();
    // A run hashes its files, too; here that is left out on both sides.
    let file = source::File { path, name: "rows.parquet".into(), bytes, sha256: "0".repeat(64), entry: 0 };
    let cache = TokenCache::Folder { path: folder.join("tokens"), named: true };
    let before = machine::memory_peak().unwrap_or(0);
    let tokenizer = Tokenizer::open(&folder).expect("a tokenizer");
    let prepared = prepared(&file, &tokenizer, tokens_max, &cache);
    let seconds = began.elapsed().as_secs_f64();
    let tokens: u64 = (0..prepared.train.len()).map(|index| prepared.train.tokens(index) as u64).sum();
    let (peak, cpu_seconds) = (machine::memory_peak().unwrap_or(0), cpu_seconds());
    let again = Instant::now();
    drop(self::prepared(&file, &tokenizer, tokens_max, &cache));
    let cached_seconds = again.elapsed().as_secs_f64();
    let epoch_seconds = arguments.iter().any(|argument| argument == "--epoch").then(|| epoch(&prepared));
    println!(
        "{}",
        serde_json::json!({
            "file_bytes": bytes, "rows": prepared.train.len(), "tokens": tokens, "seconds": seconds,
            "cpu_seconds": cpu_seconds, "tokens_per_cpu_s": (tokens as f64 / cpu_seconds).round(),
            "tokens_per_s": (tokens as f64 / seconds).round(), "peak_mb": peak >> 20, "peak_mb_before": before >> 20,
            "from_cache_seconds": cached_seconds, "epoch_seconds": epoch_seconds,
            "peak_mb_at_the_end": machine::memory_peak().unwrap_or(0) >> 20,
        })
    );
}

/// Returns the CPU time of this process and its threads, to a hundredth of a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name in brackets").split_whitespace().collect();
    [11, 12].iter().map(|&field: &usize| fields[field].parse::<f64>().expect("ticks")).sum::<f64>() / 100.0
}

fn prepared(file: &source::File, tokenizer: &Tokenizer, tokens_max: usize, cache: &TokenCache) -> Prepared {
    let options = Options { shuffle: true, seed: 42, ..Options::RECOGNISED };
    let tokens = TokenOptions {
        tokens_max,
        loss: LossOn::Answers,
        chat_template: None,
        bad_rows: dataset::BadRows::Refuse,
    };
    prepare(std::slice::from_ref(file), &options, &tokens, tokenizer, cache, &Report::silent())
        .expect("every row can be used")
}

/// Returns the seconds to lay out every batch of an epoch, in the trainer's order and packing.
fn epoch(prepared: &Prepared) -> f64 {
    let began = Instant::now();
    let options = train::Options {
        batch_examples: 16,
        epochs: 1.0,
        packing: Some(16 * 1024),
        order_seed: Some(1),
        ..train::Options::default()
    };
    let steps = Steps::new(prepared.train.len(), &options);
    let mut tokens = 0;
    for step in 0..steps.total {
        let micro_batches = steps.micro_batches(step);
        for batch in
            order::batches(&prepared.train, &micro_batches, options.packing, 16 * 1024, |key| key as u64)
        {
            tokens += batch.rows();
        }
    }
    assert!(tokens > 0);
    began.elapsed().as_secs_f64()
}

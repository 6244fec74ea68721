//! Training speed of a random model on this machine: tokens/s, seconds per step, peak memory, as one JSON line.
//!
//! `cargo bench --bench step -- --precision f32|bf16 --examples 4 --tokens 512 --steps 4 [--keep layer-inputs]`
//! The default shape has 88M parameters; the first step is not counted. `benches/compare.py` runs it in turn
//! with the reference stack.

use std::time::Instant;

use hone::facts::config::Config;
use hone::facts::family;
use hone::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization};
use hone::model::Options;
use hone::model::batch::Batch;
use hone::model::{load, random};
use hone::ops::adamw::{self, Moments, Update};
use hone::ops::number::Number;
use hone::ops::{flat, gemm};
use hone::report::Report;

fn main() {
    hone::machine::keep_freed_memory();
    let flag = |name: &str, default: &str| {
        let mut arguments = std::env::args().skip_while(|argument| argument != name);
        arguments.nth(1).unwrap_or_else(|| default.to_owned())
    };
    let number = |name: &str, default: &str| flag(name, default).parse::<usize>().expect("a whole number");
    let precision = if flag("--precision", "f32") == "bf16" { Precision::Bf16 } else { Precision::F32 };
    let keep = Keep::named(&flag("--keep", "everything")).expect("a level");
    let (examples, tokens, steps) =
        (number("--examples", "4"), number("--tokens", "512"), number("--steps", "4"));
    let (width, layers) = (number("--width", "768"), number("--layers", "12"));
    if let Ok(threads) = flag("--threads", "").parse() {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use of the pool");
    }
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 8192, "hidden_size": width, "intermediate_size": 2048 * width / 768,
        "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    });
    let folder = tempfile::tempdir().expect("a folder");
    let facts =
        family::describe(&Config::from_json(config.as_object().expect("an object").clone())).expect("facts");
    random::write(folder.path(), &facts, 1).expect("a checkpoint");
    let options = Options {
        folder: folder.path().into(),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        lora: LoraOptions::default(),
        precision,
    };
    let parameters = facts.parameters();
    let began = Instant::now();
    let decoder =
        load::load(facts, &options, &candle_core::Device::Cpu, &Report::silent()).expect("a decoder");
    let adapter = decoder.trainable(&options.lora).expect("an adapter");
    let keep = vec![keep; decoder.layers.len()];
    let load_seconds = began.elapsed().as_secs_f64();
    let moments = Moments::zeros_like(&adapter.params).expect("moments");
    let mut seconds = Vec::new();
    let mut losses = Vec::new();
    for step in 0..=steps {
        let mut batch = Batch::default();
        for example in 0..examples {
            let ids: Vec<u32> = (0..tokens)
                .map(|i| ((i * i * 7 + i * 31 + example * 131 + step * 17) % 8192) as u32)
                .collect();
            batch.push(&ids, &vec![true; tokens], tokens, (step * examples + example) as u64);
        }
        let began = Instant::now();
        let trainable = &adapter;
        flat::zero(&trainable.grads).expect("zero");
        let scale = 1.0 / batch.targets.len() as f64;
        losses.push(
            decoder
                .forward_backward(&adapter, &keep, &batch, scale)
                .and_then(|loss| loss.value())
                .expect("a step")
                * scale,
        );
        let squares = Number::squares(&trainable.grads).expect("norm");
        let update = Update {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: step as u64 + 1,
            norm_max: Some(1.0),
        };
        let (params, grads) = (&trainable.params, &trainable.grads);
        adamw::step(params, grads, &moments, &update, &squares, None).expect("an update");
        seconds.push(began.elapsed().as_secs_f64());
    }
    let mut counted = seconds[1..].to_vec();
    counted.sort_by(f64::total_cmp);
    let median = counted[counted.len() / 2];
    println!(
        "{}",
        serde_json::json!({
            "parameters": parameters, "kernel": gemm::kernel_name(precision), "threads": rayon::current_num_threads(),
            "precision": flag("--precision", "f32"), "keep": flag("--keep", "everything"), "examples": examples,
            "tokens": tokens, "load_seconds": load_seconds, "step_seconds_median": median,
            "step_seconds_min": counted[0], "step_seconds_max": counted[counted.len() - 1],
            "loss": losses.last(), "peak_rss_mb": peak_rss_mb(),
            "tokens_per_s": (examples * tokens) as f64 / median,
        })
    );
}

/// Returns the kernel's own count of the largest resident set.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

//! A job's knowledge at each stage -> facts for its report.

use std::path::Path;

use candle_core::Device;
use serde_json::{Value as Json, json};

use crate::dataset::{Prepared, Set};
use crate::device;
use crate::fetch;
use crate::memory::Running;
use crate::plan::Plan;
use crate::source;
use crate::train::Trained;

use super::described::{Described, MODEL_TEXTS};

/// Bars of the histogram of lengths.
const BARS: usize = 16;

/// Returns the properties of a machine that explain a run's speed and its numbers.
pub(super) fn environment(device: &Device) -> Json {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, word: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(word))?;
        Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
    };
    let memory = after(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok())
        .map(|kib| kib * 1024);
    let driver = read("/proc/driver/nvidia/version");
    let driver = driver.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    json!({
        "device": device::name(device),
        "cpu": after(&read("/proc/cpuinfo"), "model name"),
        "threads": rayon::current_num_threads(),
        "machine_memory_bytes": memory,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "nvidia_driver": driver,
        "hone": env!("CARGO_PKG_VERSION"),
        "build": if cfg!(feature = "cuda") { "cuda" } else { "cpu" },
        "container_image": std::env::var("HONE_IMAGE").ok(),
    })
}

/// Returns the model, and its trained parts.
pub(super) fn model(described: &Described) -> Json {
    let facts = &described.facts;
    json!({
        "family": facts.family, "layers": facts.layers.len(), "width": facts.width, "parameters": facts.parameters(),
        "trainable_parameters": described.sites.parameters(), "linear_layers": described.sites.list.len(),
    })
}

/// Returns the inputs of the run, by digests.
pub(super) fn provenance(plan: &Plan, data: &[source::File]) -> Json {
    let folder = &plan.model.folder;
    let file = |name: &&str| {
        let bytes = std::fs::read(folder.join(name)).ok()?;
        Some(json!({"name": name, "sha256": source::digest(&bytes)}))
    };
    let data = data.iter().map(|file| json!({"name": file.name, "bytes": file.bytes, "sha256": file.sha256}));
    json!({
        "base": plan.base.to_string(),
        "revision": fetch::revision(folder).ok().flatten(),
        "model_files": MODEL_TEXTS.iter().filter_map(file).collect::<Vec<_>>(),
        "data": data.collect::<Vec<_>>(),
        "configuration_sha256": source::digest(plan.json().to_string().as_bytes()),
    })
}

/// Returns the counts of rows that were read and of tokens that are learned.
pub(super) fn rows(prepared: &Prepared) -> Json {
    let (train, evaluation) = (&prepared.train, &prepared.evaluation);
    let tokens = |set: &Set| -> Vec<usize> { (0..set.len()).map(|index| set.tokens(index)).collect() };
    let lengths = [tokens(train), tokens(evaluation)].concat();
    json!({
        "read": prepared.rows,
        "train": train.len(),
        "evaluation": evaluation.len(),
        "dropped": prepared.rows.saturating_sub(lengths.len()),
        "tokens": tokens(train).iter().map(|&count| count as u64).sum::<u64>(),
        "learned": (0..train.len()).map(|index| train.learned(index)).sum::<u64>(),
        "longest": lengths.iter().max(),
        "lengths": histogram(&lengths),
    })
}

/// Returns the histogram of lengths: (shortest, longest, number of examples) of each bar.
fn histogram(lengths: &[usize]) -> Vec<(usize, usize, usize)> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let width = longest.div_ceil(BARS).max(1);
    let count =
        |from: usize| lengths.iter().filter(|&&length| (from..from + width).contains(&length)).count();
    (0..longest.div_ceil(width))
        .map(|bar| bar * width + 1)
        .map(|from| (from, from + width - 1, count(from)))
        .collect()
}

/// Returns the decisions of evaluations.
pub(super) fn evaluation(trained: &Trained) -> Json {
    let best = trained.best.as_ref();
    json!({
        "best_step": best.map(|best| best.step),
        "metric": best.map(|best| &best.metric),
        "best_metric": best.map(|best| best.value),
        "adapter": trained.adapter(),
        "stopped_early": trained.stopped_early.then(|| format!("after step {}", trained.steps)),
    })
}

/// Returns the memory plan in force.
pub(super) fn memory(memory: &Running) -> Json {
    let mut json = memory.plan.json(&memory.machine);
    json["choice"] = memory.plan.choice().into();
    json
}

/// Returns the digest of a file that was written; `None` if it cannot be read.
pub(super) fn digest(file: &Path) -> Option<String> {
    std::fs::read(file).ok().map(|bytes| source::digest(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_in_one_bar() {
        let lengths: Vec<usize> = (1..=100).chain([1000]).collect();
        let bars = histogram(&lengths);
        assert_eq!(bars.iter().map(|bar| bar.2).sum::<usize>(), lengths.len());
        assert_eq!((bars[0], bars.len()), ((1, 63, 63), 16));
        assert_eq!(bars.last().unwrap().1, 1008);
        assert!(histogram(&[]).is_empty());
        assert_eq!(histogram(&[3, 3]), [(1, 1, 0), (2, 2, 0), (3, 3, 2)]);
    }
}

//! The whole CUDA engine, on a GPU or on `tests/gpu`'s driver without one: bf16 training beside f32, what a step
//! requests from the device, and running out of device memory.
#![cfg(feature = "cuda")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::Device;
use hone::adapter;
use hone::dataset::Example;
use hone::device::{self, Choice};
use hone::facts::config::Config;
use hone::facts::family;
use hone::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization};
use hone::model::Options;
use hone::model::cache::Cache;
use hone::model::decoder::Decoder;
use hone::model::load;
use hone::model::lora::{Lora, Mixture, Part, Trainable};
use hone::model::pass::Step;
use hone::model::residency::Home;
use hone::ops::change::Change;
use hone::ops::largest;
use hone::report::{Event, Progress, Report, Sink};
use hone::train::{self, Every, Metric, Passes};

/// Returns `None` if tests may run without a GPU and there is none.
fn gpu() -> Option<Device> {
    let required = std::env::var("HONE_TEST_GPU").is_ok_and(|value| value == "require");
    match device::open(Choice::Cuda(0), &Report::silent()) {
        Ok(device) => Some(device),
        Err(fault) if required => panic!("HONE_TEST_GPU=require, but {fault}"),
        Err(_) => None,
    }
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
}

/// Returns a decoder, and the adapter that is trained on it.
fn decoder(name: &str, device: &Device, precision: Precision, dropout: f64) -> (Decoder, Trainable) {
    let options = Options {
        folder: model(name),
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        lora: LoraOptions { r: 4, alpha: 8.0, dropout, ..LoraOptions::default() },
        precision,
    };
    let facts = family::describe(&Config::read(&options.folder).unwrap()).unwrap();
    let decoder = load::load(facts, &options, device, &Report::silent()).unwrap();
    let adapter = decoder.trainable(&options.lora).unwrap();
    (decoder, adapter)
}

/// Returns examples of odd lengths, all tokens but the first supervised.
fn examples(vocab: u32) -> Vec<Example> {
    let example = |length: u32| Example {
        ids: (0..length).map(|i| (i * 37 + length * 11) % vocab).collect(),
        supervised: vec![true; length as usize],
    };
    [17, 5, 33, 64, 9, 21, 40, 2].into_iter().map(example).collect()
}

fn losses((decoder, adapter): &(Decoder, Trainable), keep: Keep) -> Vec<f64> {
    let options = train::Options {
        learning_rate: 2e-3,
        batch_examples: 2,
        accumulation: 2,
        steps_max: Some(6),
        packing: Some(64),
        logging: Every::Steps(1),
        ..train::Options::default()
    };
    let examples = examples(decoder.facts.vocab as u32);
    let mut losses = Vec::new();
    let mut log = |metric: &Metric| {
        if let Metric::Step { loss, .. } = metric {
            losses.push(*loss);
        }
        Ok(())
    };
    let data = train::Data { train: &examples, evaluation: &examples[..2] };
    let mut passes = Passes::Fixed(keep);
    train::run(decoder, adapter, data, &options, &mut passes, None, &Report::silent(), &mut log).unwrap();
    losses
}

/// Dropout's masks follow tokens, so they are the same on both devices. Sums in f32 differ only in their order.
#[test]
fn training_in_f32_gives_the_losses_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (name, dropout) in [("llama3", 0.0), ("phi3", 0.1), ("gemma2", 0.0)] {
        let expected = losses(&decoder(name, &Device::Cpu, Precision::F32, dropout), Keep::Everything);
        let found = losses(&decoder(name, &gpu, Precision::F32, dropout), Keep::Everything);
        assert_eq!(found.len(), 6);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-5, "{name}: {found}, on the CPU {expected}");
        }
    }
}

/// bf16 keeps eight bits: losses of about 6 are within 3e-2 of those in f32, and have the same bits each time.
#[test]
fn training_in_bf16_stays_near_f32_and_repeats_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    let bf16 = |keep| losses(&decoder("llama3", &gpu, Precision::Bf16, 0.0), keep);
    let found = bf16(Keep::Everything);
    for keep in [Keep::LayerInputs, Keep::HostInputs] {
        assert_eq!(bf16(keep), found, "what is kept changes nothing");
    }
    for layers in [1, 2] {
        let model = decoder("llama3", &gpu, Precision::Bf16, 0.0);
        model.0.keep_expanded(layers);
        assert_eq!(losses(&model, Keep::Everything), found, "expanded weights change nothing");
    }
    let expected = losses(&decoder("llama3", &Device::Cpu, Precision::F32, 0.0), Keep::Everything);
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 3e-2, "{found}, in f32 {expected}");
    }
    assert!(found.last() < found.first(), "{found:?}");
}

/// Returns a model with heads of 64 columns, whose attention a card of capability 9.0 computes by warpgroups: the
/// losses, and the warnings of loading it.
fn losses_of_wide_heads(device: &Device) -> (Vec<f64>, Vec<String>) {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 512,
    });
    let facts = family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap();
    let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
    let lora = LoraOptions { r: 4, alpha: 8.0, ..LoraOptions::default() };
    let options = Options { folder: "".into(), quantization, lora, precision: Precision::Bf16 };
    let warnings = Arc::new(Warnings::default());
    let report = Report::new(warnings.clone());
    let decoder = load::random(&Home::Device, facts, &options, device, &report).unwrap();
    let adapter = decoder.trainable(&options.lora).unwrap();
    let losses = losses(&(decoder, adapter), Keep::Everything);
    let warnings = warnings.0.lock().unwrap().clone();
    (losses, warnings)
}

/// Keeps the warnings of a report.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Sink for Warnings {
    fn event(&self, event: &Event) {
        if let Event::Warning { text, .. } = event {
            self.0.lock().unwrap().push(text.clone());
        }
    }

    fn progress(&self, _: &Progress) {}
}

/// Returns the launches of a kernel so far. `None` if the driver is a real one.
fn launches_of(kernel: &std::ffi::CStr) -> Option<u64> {
    type Read = extern "C" fn(*const libc::c_char) -> u64;
    // SAFETY: a name is looked up among the loaded libraries; the function of that name has this type.
    let read = unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"hone_fake_gpu_launches".as_ptr());
        std::mem::transmute::<*mut libc::c_void, Option<Read>>(found)
    }?;
    Some(read(kernel.as_ptr()))
}

/// Attention by warpgroups trains as the kernels for all cards do. If its check fails on a card, one warning says so,
/// and training goes on with the others, to the same bits as without it. Each case is a process of its own.
#[test]
fn attention_by_warpgroups_is_checked_before_its_use() {
    const CASE: &str = "HONE_WARPGROUPS";
    let Ok(case) = std::env::var(CASE) else {
        let itself = std::env::current_exe().unwrap();
        let run = |case: &str, variable: &str, value: &str| {
            let ran = std::process::Command::new(&itself)
                .args(["--exact", "attention_by_warpgroups_is_checked_before_its_use", "--nocapture"])
                .env(CASE, case)
                .env(variable, value)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&ran.stdout).into_owned();
            assert!(ran.status.success(), "{case}: {text}{}", String::from_utf8_lossy(&ran.stderr));
            let losses = text.lines().find_map(|line| line.split_once("losses "));
            losses.map(|(_, losses)| losses.to_owned())
        };
        let Some(without) = run("off", "HONE_BENCH_WITHOUT", "hopper") else { return };
        let broken = "attention_hopper_backward_key_64_bf16";
        if let Some(found) = run("broken", "HONE_FAKE_GPU_BROKEN", broken) {
            assert_eq!(found, without);
        }
        let with = run("on", "HONE_BENCH_WITHOUT", "").expect("losses");
        let numbers =
            |text: &str| -> Vec<f64> { text.split(' ').map(|loss| loss.parse().unwrap()).collect() };
        for (with, without) in numbers(&with).into_iter().zip(numbers(&without)) {
            assert!((with - without).abs() < 1e-2, "{with}, {without} by the kernels for all cards");
        }
        return;
    };
    let Some(gpu) = gpu() else { return };
    // A real card cannot be made to fail.
    if case == "broken" && launches_of(c"").is_none() {
        return;
    }
    let (losses, warnings) = losses_of_wide_heads(&gpu);
    assert_eq!(losses.len(), 6);
    // Only a build for 9.0 has these kernels.
    if let Some(launched) = launches_of(c"attention_hopper_forward_64_bf16")
        && hone::ops::cuda::launch::is_built("attention_hopper")
    {
        let steps = 2 * 6;
        match case.as_str() {
            "off" => assert_eq!((launched, warnings.len()), (0, 0)),
            "broken" => {
                assert_eq!(
                    (launched, warnings.len()),
                    (2, 1),
                    "the check's own, and one warning: {warnings:?}"
                );
                assert!(warnings[0].contains("heads of 64 columns"), "{warnings:?}");
            }
            _ => assert!(launched >= 2 + steps && warnings.is_empty(), "{launched}: {warnings:?}"),
        }
    }
    let losses: Vec<String> = losses.iter().map(f64::to_string).collect();
    println!("losses {}", losses.join(" "));
}

/// Products with the frozen layers in 8 bits: the same bits whatever is kept, near the same rounding on the CPU, and
/// not the losses of bf16.
#[test]
fn training_in_8_bits_repeats_bit_for_bit_and_rounds_as_the_cpu_does() {
    let Some(gpu) = gpu() else { return };
    for name in ["llama3", "phi3"] {
        let fp8 = |keep| losses(&decoder(name, &gpu, Precision::Fp8, 0.1), keep);
        let found = fp8(Keep::Everything);
        assert_eq!(fp8(Keep::HostInputs), found, "{name}: what is kept changes nothing");
        let model = decoder(name, &gpu, Precision::Fp8, 0.1);
        model.0.keep_expanded(1);
        assert_eq!(losses(&model, Keep::LayerInputs), found, "{name}: weights that are kept change nothing");
        let expected = losses(&decoder(name, &Device::Cpu, Precision::Fp8, 0.1), Keep::Everything);
        // TOLERANCE: a value that bf16 moves across a boundary of E4M3 becomes another number there, and that grows
        // from layer to layer. So both are not equal, but nearer to each other than to f32.
        let exact = losses(&decoder(name, &Device::Cpu, Precision::F32, 0.1), Keep::Everything);
        let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>();
        let (between, rounding) =
            (apart(&found, &expected), apart(&found, &exact).max(apart(&expected, &exact)));
        assert!(between < rounding, "{name}: {found:?}, on the CPU {expected:?}, in f32 {exact:?}");
        assert!(found.last() < found.first(), "{found:?}");
        let other = losses(&decoder(name, &gpu, Precision::Bf16, 0.1), Keep::Everything);
        assert_ne!(found, other, "{name}: products in 8 bits are others than in bf16");
    }
}

/// The order of all accesses is the same whether kernels begin while the one before them ends or not, in graphs and
/// launch by launch (inputs of layers on the host).
#[test]
fn kernels_that_begin_early_change_no_bit() {
    let Some(gpu) = gpu() else { return };
    for keep in [Keep::Everything, Keep::HostInputs] {
        let run = |early: bool| {
            // It changes nothing for other tests of this process.
            Change::Early.set(early);
            let found = losses(&decoder("llama3", &gpu, Precision::Bf16, 0.1), keep);
            Change::Early.set(true);
            found
        };
        assert_eq!(run(true), run(false), "{keep:?}");
    }
}

/// Code for cards before 9.0 has no wait, so no kernel may begin early there. The fake driver ends the process if one
/// does.
#[test]
fn cards_before_9_0_begin_no_kernel_early() {
    if std::env::var_os("HONE_OLD_CARD").is_none() {
        let itself = std::env::current_exe().unwrap();
        let ran = std::process::Command::new(itself)
            .args(["--exact", "cards_before_9_0_begin_no_kernel_early", "--nocapture"])
            .env("HONE_OLD_CARD", "1")
            .env("HONE_FAKE_GPU_CAPABILITY", "8.9")
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        return;
    }
    let Some(gpu) = gpu() else { return };
    if asked().is_none() {
        return;
    }
    losses(&decoder("llama3", &gpu, Precision::Bf16, 0.0), Keep::Everything);
    let asked = asked().unwrap();
    assert_eq!((asked.early_launches, asked.early_edges), (0, 0));
    assert!(asked.launches > 100 && asked.graph_launches > 0, "{asked:?}");
}

/// `hone_fake_gpu_statistics` of kernels/driver/statistics.h: the requests to the device since the program began.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    launches: u64,
    products: u64,
    allocations: u64,
    frees: u64,
    live_bytes: u64,
    peak_bytes: u64,
    host_synchronizations: u64,
    device_to_host_copies: u64,
    device_to_host_bytes: u64,
    host_to_device_copies: u64,
    host_to_device_bytes: u64,
    device_to_device_copies: u64,
    fills: u64,
    events: u64,
    choices: u64,
    graphs: u64,
    graph_launches: u64,
    graph_bytes: u64,
    early_launches: u64,
    early_edges: u64,
}

/// Returns `None` if the driver is a real one.
fn asked() -> Option<Asked> {
    type Read = extern "C" fn(*mut Asked, usize) -> usize;
    // SAFETY: a name is looked up among the loaded libraries; the function of that name has this type.
    let read = unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"hone_fake_gpu_stats".as_ptr());
        std::mem::transmute::<*mut libc::c_void, Option<Read>>(found)
    }?;
    let mut asked = Asked::default();
    assert_eq!(read(&mut asked, size_of::<Asked>()), size_of::<Asked>(), "statistics.h has the same fields");
    Some(asked)
}

/// Runs a test of this program in a process of its own, since the counts are those of the whole process and other tests
/// run in this one. Returns false in that process, which does the test's work.
fn ran_alone(test: &str) -> bool {
    const VARIABLE: &str = "HONE_COUNT_ALONE";
    if std::env::var_os(VARIABLE).is_some() {
        return false;
    }
    let itself = std::env::current_exe().unwrap();
    let counted = std::process::Command::new(itself)
        .args(["--exact", test, "--nocapture"])
        .env(VARIABLE, "1")
        .output()
        .unwrap();
    print!("{}", String::from_utf8_lossy(&counted.stdout));
    assert!(counted.status.success(), "{}", String::from_utf8_lossy(&counted.stderr));
    true
}

/// Steps of one shape. Every launch, copy and wait of a step has a known reason. The program of this test must do
/// nothing else at that time, so it is a process of its own.
#[test]
fn what_a_step_asks_of_the_device() {
    if ran_alone("what_a_step_asks_of_the_device") {
        return;
    }
    let Some(gpu) = gpu() else { return };
    if asked().is_none() {
        return;
    }
    let (decoder, adapter) = decoder("llama3", &gpu, Precision::Bf16, 0.0);
    assert_eq!(decoder.layers.len(), 2);
    Change::Steps.set(false);
    let (before, after) = two_steps(&decoder, &adapter, Keep::Everything);
    let found = [
        // A layer forward: two norms, rope, attention, activation, seven weights that are expanded (the first of each
        // input with the pairs), and three low-rank products kept. Backward: two norms, two of attention (with rope),
        // one of the activation, seven weights, a pass over four gradients and the sums of its parts, a pass over two
        // norms' inputs and its sums. Thirteen around the layers. The lowest layer's first three linear layers need no
        // gradient of their input: one launch puts their pairs where three expand weights, and a norm is missing.
        ("launches", after.launches - before.launches, LAUNCHES),
        // A card of 9.0 begins each while the one before it ends.
        ("early launches", after.early_launches - before.early_launches, LAUNCHES),
        // Layers that read the same input have two products forward (A; base and B) and one backward, for the gradient
        // of their input. Two of the four inputs come from no norm: a product gives the gradient of A. The head has
        // two.
        ("products", after.products - before.products, 2 * (8 + 6) - 1 + 2),
        // The numbers of the step before.
        ("waits of the host", after.host_synchronizations - before.host_synchronizations, 1),
        // Loss, norm of the gradient, norm of the parameters.
        ("copies to the host", after.device_to_host_copies - before.device_to_host_copies, 3),
        ("bytes to the host", after.device_to_host_bytes - before.device_to_host_bytes, 24),
        // Ids, positions, rows, targets, the loss's scale, dropout's keys, tiles of attention.
        ("copies to the device", after.host_to_device_copies - before.host_to_device_copies, 10),
        // The residual stream is added from its own memory.
        ("copies on the device", after.device_to_device_copies - before.device_to_device_copies, 0),
        // A shape's algorithm is chosen in its first step.
        ("choices of an algorithm", after.choices - before.choices, 0),
        (
            "allocations not freed",
            (after.allocations - before.allocations).abs_diff(after.frees - before.frees),
            0,
        ),
        // Behind the gradients are places for the losses of 32 ranks. Expanded weights lie together by their input, and
        // 64 spare columns are half of this model's width. The batch's lists are there from the beginning of a pass on.
        ("peak bytes", after.peak_bytes, 1_706_676),
    ];
    for (what, found, expected) in found {
        assert_eq!(found, expected, "{what}");
    }
    // Weights that are kept expanded are not expanded for a product: one launch for each of four inputs writes the
    // pairs beside them. That is three launches less in each direction of a layer, and one in the lowest layer's
    // backward pass.
    decoder.keep_expanded(2);
    let (before, after) = two_steps(&decoder, &adapter, Keep::Everything);
    assert_eq!(after.launches - before.launches, LAUNCHES - 3 * 3 - 1, "launches with weights kept expanded");
    // Inputs of both layers go to the host and come back, and nobody waits for them.
    let (before, after) = two_steps(&decoder, &adapter, Keep::HostInputs);
    assert_eq!(after.host_synchronizations - before.host_synchronizations, 1, "waits of the host");
    assert_eq!(after.device_to_host_copies - before.device_to_host_copies, 3 + 2, "copies to the host");
    assert_eq!(after.host_to_device_copies - before.host_to_device_copies, 10 + 2, "copies to the device");
    // A pass by its graph. The other launches lie around the passes: the sums of squares of the gradient and of the
    // parameters (two launches each), and the update. The loss is copied out of the graph's place; numbers, f32 values
    // and keys go into their places, and nobody waits for them.
    Change::Steps.set(true);
    let (before, after) = two_steps(&decoder, &adapter, Keep::Everything);
    let found = [
        ("launches", after.launches - before.launches, 5),
        ("products", after.products - before.products, 0),
        ("launches of a graph", after.graph_launches - before.graph_launches, 1),
        ("waits of the host", after.host_synchronizations - before.host_synchronizations, 1),
        ("copies to the host", after.device_to_host_copies - before.device_to_host_copies, 3),
        ("copies to the device", after.host_to_device_copies - before.host_to_device_copies, 3),
        ("copies on the device", after.device_to_device_copies - before.device_to_device_copies, 1),
        (
            "allocations not freed",
            (after.allocations - before.allocations).abs_diff(after.frees - before.frees),
            0,
        ),
    ];
    for (what, found, expected) in found {
        assert_eq!(found, expected, "{what} of a step with a graph");
    }
}

/// A step with products in 8 bits: kernels that make the operands of products write them in 8 bits too, which saves
/// thirteen passes: in each of two layers both norms, the activation, the gradient of the output projection, and those
/// of gate and of up; and the gradient of the lower layer's output. The remaining passes of a layer round attention's
/// output and the gradients of queries, of keys and of values; and one rounds the gradient of the upper layer's output,
/// which comes from the rows with targets.
#[test]
fn what_rounding_asks_of_the_device() {
    if ran_alone("what_rounding_asks_of_the_device") {
        return;
    }
    let Some(gpu) = gpu() else { return };
    if asked().is_none() {
        return;
    }
    let (decoder, adapter) = decoder("llama3", &gpu, Precision::Fp8, 0.0);
    decoder.keep_expanded(2);
    Change::Steps.set(false);
    let count = |rounded: bool| {
        Change::Rounded.set(rounded);
        let passes = || launches_of(c"fp8_rows_bf16").unwrap();
        let all = passes();
        let (before, after) = two_steps(&decoder, &adapter, Keep::Everything);
        (after.launches - before.launches, after.products - before.products, (passes() - all) / 6)
    };
    let (without, with) = (count(false), count(true));
    // The lowest layer needs no gradient of the input of q, k and v.
    assert_eq!((without.2, with.2), (2 * (4 + 7) - 3, 2 * (1 + 3) - 3 + 1), "passes that round");
    assert_eq!(without.0 - with.0, 13, "launches");
    assert_eq!(without.1, with.1, "products");
}

/// Launches of a step.
const LAUNCHES: u64 = 2 * (15 + 24) - 3 + 13;

/// Returns the counts when one step was queued, and when the next one was.
fn two_steps(decoder: &Decoder, adapter: &Trainable, keep: Keep) -> (Asked, Asked) {
    let vocab = decoder.facts.vocab as u32;
    let example = |at: u32| Example {
        ids: (0..32).map(|i| (i * 37 + at * 11) % vocab).collect(),
        supervised: vec![true; 32],
    };
    let examples: Vec<Example> = (0..12).map(example).collect();
    let options = train::Options {
        batch_examples: 2,
        steps_max: Some(6),
        packing: Some(64),
        order_seed: None,
        logging: Every::Steps(1),
        ..train::Options::default()
    };
    let mut marks = Vec::new();
    let mut log = |_: &Metric| {
        marks.push(asked().expect("it was there before"));
        Ok(())
    };
    let data = train::Data { train: &examples, evaluation: &[] };
    let mut passes = Passes::Fixed(keep);
    train::run(decoder, adapter, data, &options, &mut passes, None, &Report::silent(), &mut log).unwrap();
    // The third step's line is written when the fourth has been queued, so one step lies between two such lines.
    (marks[2], marks[3])
}

/// A step that decodes a token of each sequence: every launch and copy has a known reason. The test is a process of its
/// own, as above.
#[test]
fn what_a_decoded_token_asks_of_the_device() {
    if ran_alone("what_a_decoded_token_asks_of_the_device") {
        return;
    }
    let Some(gpu) = gpu() else { return };
    if asked().is_none() {
        return;
    }
    // (model, sequences, adapters): launches, products, waits, copies and bytes to the host, copies to the device,
    // launches of a graph.
    // A layer of nine launches: norm, q k v, rope with keeping, attention, output, norm, gate and up, activation, down;
    // one more for adapters, of attention's output: other inputs come from the launches that make them, if few rows
    // have adapters. Around the layers: embedding, angles, norm, head, the largest logit. Four bytes a token go to the
    // host.
    let expected = [
        (("llama3", 1, false), [23, 0, 0, 1, 4, 7, 0]),
        (("llama3", 3, true), [25, 0, 0, 1, 12, 9, 0]),
        (("phi3", 1, false), [23, 0, 0, 1, 4, 7, 0]),
        (("phi3", 3, true), [25, 0, 0, 1, 12, 9, 0]),
        (("phi3", 32, true), [31, 0, 0, 1, 128, 9, 0]),
    ];
    // A graph needs one launch and one wait. Its copies are not asked for by themselves. Three rows are filled up to
    // four.
    let (mut wrong, mut edges) = (Vec::new(), Vec::new());
    for ((name, sequences, adapted), expected) in expected {
        let before = asked().unwrap();
        let (decoder, _) = decoder(name, &gpu, Precision::Bf16, 0.0);
        assert_eq!(decoder.layers.len(), 2);
        let adapter = adapter::read(&model(name).parent().unwrap().join("final_adapter")).unwrap();
        let pairs = adapter.pairs(&decoder.facts, decoder.dtype, decoder.dtype, &gpu).unwrap();
        let mut cache =
            Cache::new(&decoder.facts, 64 * sequences, 64, candle_core::DType::BF16, &gpu).unwrap();
        let pages: Vec<Vec<u32>> = (0..sequences).map(|_| cache.reserve(64, &[]).unwrap().pages).collect();
        let mut token = |position: usize, graphs: bool| {
            let before = asked().unwrap();
            let mut step = Step::default();
            for (row, pages) in pages.iter().enumerate() {
                step.push(&[7 + row as u32], position, pages.clone(), 64);
                step.wanted.push(row as u32);
            }
            let part = |row| Part { adapter: &pairs, rows: row..row + 1, strength: 0.5 };
            let parts = (0..sequences).filter(|_| adapted).map(part).collect();
            let mixture = Mixture::new(parts);
            if graphs {
                let decoded = decoder
                    .decode(&step, &mut cache, &mixture, None, sequences.max(4))
                    .unwrap()
                    .expect("a graph");
                assert_eq!(decoded.tokens.len(), sequences);
            } else {
                let logits = decoder.step(&step, &mut cache, Lora::Mixed(&mixture)).unwrap();
                assert_eq!(largest::tokens(&logits).unwrap().len(), sequences);
            }
            drop(mixture);
            let after = asked().unwrap();
            [
                after.launches - before.launches,
                after.products - before.products,
                after.host_synchronizations - before.host_synchronizations,
                after.device_to_host_copies - before.device_to_host_copies,
                after.device_to_host_bytes - before.device_to_host_bytes,
                after.host_to_device_copies - before.host_to_device_copies,
                after.graph_launches - before.graph_launches,
            ]
        };
        // The first step loads kernels and makes the adapter's table.
        let found = [0, 1, 2].map(|position| token(position, false));
        assert_eq!(found[1], found[2], "{name}: two steps ask for the same");
        // The first step of its shape is done launch by launch, the second one is recorded and launched.
        let replayed = [3, 4, 5, 6].map(|position| token(position, true));
        assert_eq!(replayed[2], replayed[3], "{name}: two steps ask for the same");
        let filled = 4 * (sequences as u64).next_power_of_two();
        for (found, expected) in [(found[2], expected), (replayed[3], [0, 0, 1, 0, filled, 0, 1])] {
            if found != expected {
                let what = format!("{name}, {sequences} sequences, adapted: {adapted}");
                wrong.push(format!("{what}: {found:?}, not {expected:?}"));
            }
        }
        let (graphs, bytes) = cache.replay().expect("there is one").size();
        assert_eq!(graphs, 1, "{name}");
        // Its tensors are those that the step before it made, so nothing stands between its kernels.
        assert_eq!(asked().unwrap().graph_bytes, 0, "{name}: memory of graphs");
        assert!((1..1 << 20).contains(&bytes), "{name}: {bytes} bytes");
        edges.push((asked().unwrap().early_edges - before.early_edges, expected[0] - 1));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Each kernel but the first, which follows copies, begins while the one before it ends.
    assert!(edges.iter().all(|(found, expected)| found == expected), "{edges:?}");
}

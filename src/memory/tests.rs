//! Promises of a plan: it counts the bytes that real layers keep, mixtures fit and recompute least, refusals have
//! numbers.

use serde_json::{Value, json};

use super::*;
use crate::facts::config::Config;
use crate::facts::sites;
use crate::facts::{Facts, FourBitCode, LoraOptions, Precision, Quantization, family};
use crate::model::batch::Batch;
use crate::model::{load, random};

fn facts(config: Value) -> Facts {
    family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap()
}

fn phi3_mini() -> Facts {
    facts(json!({
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "sliding_window": 2047,
    }))
}

fn task(facts: Facts, tokens: usize) -> Task {
    let options = LoraOptions { r: 16, ..LoraOptions::default() };
    Task {
        sites: sites::sites(&facts, &options).unwrap().list,
        tokens: Vec::new(),
        facts,
        quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        precision: Precision::Bf16,
        dropout: false,
        bf16_checkpoint: true,
        tokens_min: 512,
        tokens_max: tokens,
        example_tokens: 512,
        eight_bit_moments: false,
        keep: None,
        residency: None,
    }
}

fn gpu(name: &str) -> Machine {
    card::find(name).unwrap().0.machine(None).unwrap()
}

fn with_memory(memory: u64) -> Machine {
    Machine { memory, ..gpu("h200") }
}

fn gigabytes(term: &str, plan: &Plan) -> f64 {
    plan.terms.iter().find(|found| found.what.contains(term)).map_or(0.0, |term| term.bytes as f64 / 1e9)
}

/// Computed by hand: 3.62e9 base weights at 0.516 bytes, 25.2e6 parameters of pairs at 18, 70 kB per token and
/// layer. 12 GiB are enough for that, and not for a layer's weights of 0.23 GB as well.
#[test]
fn bytes_are_those_of_phi3_mini() {
    let task = task(phi3_mini(), 4096);
    let everything = needed(&task, &gpu("h200"), 4096, Keep::Everything);
    let plan = solve(&task, &with_memory(everything + (200 << 20))).unwrap();
    assert_eq!(plan.expanded, 0, "{}", plan.choice());
    assert_eq!(plan.keep, [Keep::Everything; 32]);
    assert_eq!(plan.tokens, 4096);
    assert!((gigabytes("base", &plan) - 1.87).abs() < 0.01, "{plan:?}");
    assert!((gigabytes("adapter", &plan) - 0.45).abs() < 0.01, "{plan:?}");
    assert!((gigabytes("expanded", &plan) - 0.10).abs() < 0.01, "{plan:?}");
    let a_layer_and_token = gigabytes("kept", &plan) * 1e9 / 32.0 / 4096.0;
    assert!((a_layer_and_token / 70e3 - 1.0).abs() < 0.02, "{a_layer_and_token}");
}

#[test]
fn less_memory_recomputes_more_and_always_fits() {
    let task = Task { tokens_min: 4096, ..task(phi3_mini(), 4096) };
    let mut last: Option<Plan> = None;
    for gibibytes in (4..20).rev() {
        let machine = with_memory(gibibytes << 30);
        let Ok(plan) = solve(&task, &machine) else {
            assert!(gibibytes < 5, "{gibibytes} GiB are enough");
            break;
        };
        assert!(plan.bytes() <= machine.memory);
        // Weights that no longer fit lie on the host, which leaves more room for the values that layers keep.
        if let Some(last) = last.as_ref().filter(|last| last.residency == plan.residency) {
            let (slower, faster) = (plan.tokens_per_second(), last.tokens_per_second());
            assert!(
                slower <= faster,
                "{gibibytes} GiB: {slower} {}, above {faster} {}",
                plan.choice(),
                last.choice()
            );
        }
        last = Some(plan);
    }
    let mixed = solve(&task, &with_memory(8 << 30)).unwrap();
    assert!(mixed.keep.iter().any(|keep| *keep != mixed.keep[0]), "{}", mixed.choice());
    // The plan just fits: if one more layer kept everything, it would not.
    let machine = gpu("h200");
    let solver = Solver::new(&task, &machine, Residency::Resident);
    let upgraded = mixed.keep.iter().position(|keep| *keep != Keep::Everything).unwrap();
    let mut keep = mixed.keep.clone();
    keep[upgraded] = Keep::Everything;
    assert!(solver.describe(mixed.tokens, &keep, mixed.expanded).bytes() > 8 << 30);
}

/// Compared with all 625 choices for four layers, each with 0 to 4 of them expanded, the plan is at most a sixteenth of
/// a pass slower than the best.
#[test]
fn the_mix_is_close_to_the_best_of_all() {
    let mut small = phi3_mini();
    small.layers.truncate(4);
    let task = task(small, 2048);
    let machine = gpu("l4");
    let solver = Solver::new(&task, &machine, Residency::Resident);
    let mut all = Vec::new();
    for choice in 0..5usize.pow(5) {
        let keep: Vec<Keep> = (0..4).map(|layer| Keep::ALL[choice / 5usize.pow(layer) % 5]).collect();
        let plan = solver.describe(2048, &keep, choice / 5usize.pow(4));
        all.push((plan.bytes(), plan.seconds));
    }
    let (most, least) =
        (all.iter().map(|plan| plan.0).max().unwrap(), all.iter().map(|plan| plan.0).min().unwrap());
    let one_layer = all.iter().map(|plan| plan.1).fold(0.0, f64::max) / 16.0;
    for sixteenth in 1..16 {
        let room = least + (most - least) * sixteenth / 16;
        let found = solver.levels(2048, room).unwrap();
        assert!(found.bytes() <= room);
        let best = all.iter().filter(|plan| plan.0 <= room).map(|plan| plan.1).fold(f64::MAX, f64::min);
        assert!(found.seconds - best <= one_layer, "{sixteenth}/16: {} against {best}", found.seconds);
    }
}

/// In narrow layers an expanded weight saves more time for its bytes than values that the layers keep.
#[test]
fn narrow_layers_expand_their_weights_first() {
    let mut narrow = crate::facts::shapes::facts("tiny").unwrap();
    narrow.layers.extend(narrow.layers.clone());
    // So many tokens that computing takes longer than launching.
    let tokens = 1 << 17;
    let task = task(narrow, tokens);
    let machine = gpu("l4");
    let solver = Solver::new(&task, &machine, Residency::Resident);
    let bytes = |keep: Keep, expanded: usize| solver.describe(tokens, &[keep; 4], expanded).bytes();
    let (least, most) = (bytes(Keep::HostInputs, 0), bytes(Keep::Everything, 4));
    let rooms = (1..16).map(|sixteenth| least + (most - least) * sixteenth / 16);
    let plans: Vec<Plan> = rooms.filter_map(|room| solver.levels(tokens, room)).collect();
    assert!(plans.iter().any(|plan| plan.expanded == 4 && plan.keep != [Keep::Everything; 4]), "{plans:?}");
}

/// Phi-3-mini's weights take 7.25 GB in bf16, and 7.45 with 64 columns and rows for their pairs. Expanding them twice a
/// pass moves 2.52 bytes a value each time.
#[test]
fn weights_are_kept_expanded_with_what_is_left() {
    let task = task(phi3_mini(), 4096);
    let plan = solve(&task, &gpu("h200")).unwrap();
    assert_eq!((plan.keep.as_slice(), plan.expanded), ([Keep::Everything; 32].as_slice(), 32));
    assert!((gigabytes("in full", &plan) - 7.45).abs() < 0.01, "{plan:?}");
    assert_eq!(gigabytes("expanded for a product", &plan), 0.0, "no product needs it");
    let saved = 2.0 * 3.62e9 * 2.52 / (4.3e12 * cost::COPY_SHARE);
    assert!((plan.expanded_saves / saved - 1.0).abs() < 0.01, "{} of {saved}", plan.expanded_saves);
    let text = plan.table(&task, &gpu("h200"));
    assert!(text.contains("weights of 32 of 32 layers are kept expanded beside their 4 bits"), "{text}");
    // With less memory, the values that layers keep come first, then as many expanded layers as fit.
    let some = solve(&task, &with_memory(16 << 30)).unwrap();
    assert_eq!(some.keep, [Keep::Everything; 32]);
    assert!((1..32).contains(&some.expanded), "{}", some.expanded);
    let more = needed(&task, &gpu("h200"), 4096, Keep::Everything)
        + terms::expanded_layers(&task)[..=some.expanded].iter().sum::<usize>() as u64;
    assert!(some.bytes() <= 16 << 30 && more > 16 << 30, "{} GiB", some.bytes() >> 30);
    // Out of memory: they go first, and stay away.
    let next = next_smaller(&task, &with_memory(16 << 30), &some).unwrap();
    assert_eq!((next.expanded, next.keep.clone(), next.tokens), (0, some.keep, some.tokens));
    let after = next_smaller(&task, &with_memory(16 << 30), &next).unwrap();
    assert_eq!(after.expanded, 0);
    // A CPU expands nothing, and weights that lie elsewhere are not kept on the device.
    let cpu = Machine { place: Place::Cpu { threads: 2 }, taken: 0, ..with_memory(64 << 30) };
    assert_eq!(solve(&task, &cpu).unwrap().expanded, 0);
    let streamed = Task { residency: Some(Residency::Streamed), ..task.clone() };
    assert_eq!(solve(&streamed, &gpu("h200")).unwrap().expanded, 0);
    let bare = Task { quantization: Quantization::None, ..task };
    assert_eq!(solve(&bare, &gpu("h200")).unwrap().expanded, 0);
}

/// Inputs of 32 layers and 4,096 tokens in bf16 are 0.81 GB of page-locked memory.
#[test]
fn inputs_are_moved_to_a_host_that_has_room_for_them() {
    let task = Task { keep: Some(Keep::HostInputs), tokens_min: 4096, ..task(phi3_mini(), 4096) };
    let plan = solve(&task, &with_memory(6 << 30)).unwrap();
    assert_eq!(plan.host_inputs, 32 * 4096 * 3072 * 2);
    let text = plan.table(&task, &with_memory(6 << 30));
    assert!(text.contains("inputs of 32 layers are kept in 768.0 MiB of host memory"), "{text}");
    let small = Machine { host: Some(700 << 20), ..with_memory(6 << 30) };
    let refused = solve(&task, &small).unwrap_err();
    assert!(refused.help.unwrap().contains("768.0 MiB of host memory for inputs of layers"));
    // The copies run beside the computation and take less time than it.
    let device = Task { keep: Some(Keep::LayerInputs), ..task.clone() };
    let beside = solve(&device, &with_memory(16 << 30)).unwrap();
    let linked = 2.0 * plan.host_inputs as f64 / gpu("h200").rates.link;
    let away = solve(&task, &with_memory(16 << 30)).unwrap();
    assert!(away.seconds > beside.seconds && away.seconds < beside.seconds + 0.2 * linked);
}

#[test]
fn a_smaller_plan_follows_until_the_smallest() {
    let task = task(phi3_mini(), 4096);
    let machine = gpu("l4");
    let mut plan = solve(&task, &machine).unwrap();
    let mut plans = 0;
    while let Some(next) = next_smaller(&task, &machine, &plan) {
        assert!(next.bytes() < plan.bytes());
        (plan, plans) = (next, plans + 1);
        assert!(plans < 40, "it never ends");
    }
    assert_eq!((plan.tokens, plan.keep[0]), (512, Keep::HostInputs));
    assert!(plans > 3);
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let mut task = task(phi3_mini(), 65536);
    task.tokens_min = 65536;
    let fault = solve(&task, &with_memory(5 << 30)).unwrap_err();
    assert_eq!(fault.kind, crate::fault::Kind::Capacity);
    assert!(fault.message.contains("5.0 GiB can be used on h200"), "{fault}");
    let help = fault.help.unwrap();
    assert!(help.contains("max_length") && help.contains("use a larger card, such as "), "{help}");
    // The length that the help offers fits, and one more token does not.
    let fits: usize = help.split("max_length ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    task.tokens_min = fits;
    solve(&task, &with_memory(5 << 30)).unwrap();
    task.tokens_min = fits + 1;
    solve(&task, &with_memory(5 << 30)).unwrap_err();
}

#[test]
fn a_given_level_is_taken_and_layers_below_the_adapter_keep_nothing() {
    let mut task = task(phi3_mini(), 4096);
    task.keep = Some(Keep::LayerInputs);
    let plan = solve(&task, &gpu("h200")).unwrap();
    assert_eq!(plan.keep, [Keep::LayerInputs; 32]);
    let kept = gigabytes("kept", &plan);
    task.sites.retain(|site| site.layer >= 16);
    let half = gigabytes("kept", &solve(&task, &gpu("h200")).unwrap());
    assert!((half / kept - 0.5).abs() < 1e-6, "{half} of {kept}");
}

#[test]
fn a_cpu_keeps_f32_and_moves_nothing_to_itself() {
    let task = task(phi3_mini(), 4096);
    let machine = Machine { place: Place::Cpu { threads: 2 }, taken: 0, ..with_memory(64 << 30) };
    let plan = solve(&task, &machine).unwrap();
    let on_gpu = solve(&task, &gpu("h200")).unwrap();
    assert!((gigabytes("kept", &plan) / gigabytes("kept", &on_gpu) - 2.0).abs() < 0.01);
    assert_eq!(gigabytes("expanded", &plan), 0.0);
    let tight = Solver::new(&task, &machine, Residency::Resident).smallest();
    assert_eq!(tight.keep[0], Keep::LayerInputs);
}

/// The published figures are for the same shape. They predict 32.6k tokens/s on an H200 with kernels that are
/// better than hone's.
#[test]
fn predictions_are_of_the_right_size() {
    let rate = |card| solve(&task(phi3_mini(), 4096), &gpu(card)).unwrap().tokens_per_second();
    assert!((18e3..36e3).contains(&rate("h200")), "{}", rate("h200"));
    assert!((6e3..13e3).contains(&rate("a100-80")), "{}", rate("a100-80"));
    assert!((1e3..3e3).contains(&rate("l4")), "{}", rate("l4"));
}

/// Compares the plan's bytes with the tensors that real layers hold, for plain layers and for those with more
/// norms.
#[test]
fn layers_keep_what_the_plan_counts() {
    keep_what_the_plan_counts(&Device::Cpu, Place::Cpu { threads: 1 });
}

#[cfg(feature = "cuda")]
#[test]
fn layers_on_a_gpu_keep_what_the_plan_counts() {
    let Some(device) = crate::ops::judge::gpu() else { return };
    keep_what_the_plan_counts(&device, Place::Gpu);
}

fn keep_what_the_plan_counts(device: &Device, place: Place) {
    let common = json!({
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    });
    for family in ["llama", "phi3", "qwen3", "gemma2"] {
        let mut config = common.clone();
        config["model_type"] = family.into();
        if family == "gemma2" {
            config["hidden_activation"] = "gelu_pytorch_tanh".into();
        }
        let facts = facts(config);
        let folder = tempfile::tempdir().unwrap();
        random::write(folder.path(), &facts, 3).unwrap();
        let options = crate::model::Options {
            folder: folder.path().into(),
            quantization: Quantization::FourBit { code: FourBitCode::Nf4, double: true },
            lora: LoraOptions { r: 3, layers: vec![1], ..LoraOptions::default() },
            precision: Precision::F32,
        };
        let silent = crate::report::Report::silent();
        let decoder = load::load(facts.clone(), &options, device, &silent).unwrap();
        let adapter = decoder.trainable(&options.lora).unwrap();
        let task = Task { sites: adapter.sites.clone(), ..task(facts, 64) };
        let mut batch = Batch::default();
        batch.push(&[5; 11], &[true; 11], 11, 0);
        batch.push(&[7; 6], &[true; 6], 6, 1);
        for keep in Keep::ALL {
            let found = decoder.kept_values(&adapter, &[keep; 2], &batch).unwrap();
            let counted: Vec<usize> =
                (0..2).map(|layer| Kept::of(&task, place, layer).at(keep) * batch.rows()).collect();
            assert_eq!(found, counted, "{family}, {}", keep.name());
        }
    }
}

/// Products in 8 bits: faster than in bf16 on an H100, with or without room for kept weights, which take as much as in
/// bf16. A task is refused on a card that has none, and on a CPU.
#[test]
fn products_in_8_bits_are_planned_and_refused_by_card() {
    let bf16 = task(phi3_mini(), 4096);
    let fp8 = Task { precision: Precision::Fp8, ..bf16.clone() };
    for memory in [8u64 << 30, 70 << 30] {
        let machine = Machine { memory, ..gpu("h100") };
        let (slow, fast) = (solve(&bf16, &machine).unwrap(), solve(&fp8, &machine).unwrap());
        assert!(fast.seconds < 0.95 * slow.seconds, "{} {}", fast.seconds, slow.seconds);
        assert_eq!(slow.expanded, fast.expanded, "at {memory}");
        if slow.expanded > 0 {
            let (of_bf16, of_fp8) =
                (gigabytes("weights in full", &slow), gigabytes("weights in full", &fast));
            assert!((of_fp8 / of_bf16 - 1.0).abs() < 0.05, "{of_bf16} {of_fp8}");
        }
    }
    for (card, found) in
        [("a100-80", "found compute capability 8.0"), ("a10", "found compute capability 8.6")]
    {
        let fault = solve(&fp8, &gpu(card)).unwrap_err();
        assert_eq!(fault.kind, crate::fault::Kind::Config);
        assert!(fault.message.contains(found) && fault.message.contains("expected a GPU"), "{fault}");
    }
    for card in ["l4", "rtx-4090", "h200", "b200", "rtx-5090"] {
        assert!(solve(&fp8, &gpu(card)).is_ok(), "{card}");
    }
    let cpu = Machine { place: Place::Cpu { threads: 2 }, capability: None, ..with_memory(64 << 30) };
    assert!(solve(&fp8, &cpu).unwrap_err().message.contains("found no GPU"));
}

/// Returns QLoRA of Llama 3.3 70B with rank 16 on all linear layers, in passes of one example of 2,048 tokens.
fn llama_70b() -> Task {
    let facts = crate::facts::shapes::facts("llama3.3-70b").unwrap();
    Task { tokens_min: 2048, example_tokens: 2048, ..task(facts, 2048) }
}

fn planned(task: &Task, gpus: &str) -> Plan {
    let machine = card::machine(gpus, None).unwrap();
    let plan = solve(task, &machine).unwrap();
    assert!(plan.bytes() <= machine.memory, "{plan:?}");
    plan
}

#[test]
fn a_70b_model_is_shared_by_four_cards_of_24_gb() {
    for gpus in ["4xl4", "4xa10", "g5.12xlarge"] {
        let plan = planned(&llama_70b(), gpus);
        assert_eq!((plan.residency, plan.ranks), (Residency::Shared, 4), "{gpus}");
        // 68.5e9 weights at 0.516 bytes are 35.3 GB; a layer of them is 0.44 GB.
        assert!((gigabytes("pieces of the base", &plan) - 35.3 / 4.0).abs() < 0.1, "{plan:?}");
        assert!((gigabytes("two buffers", &plan) - 0.88).abs() < 0.01, "{plan:?}");
        assert_eq!(gigabytes("embedding", &plan), 0.0, "it stays on the host");
        assert_eq!(plan.host_bytes, 128_256 * 8192 * 2);
        // Three quarters of the base come over the link in each direction, except two layers at each turn.
        let brought = plan.brought as f64 / 1e9;
        assert!((brought / (2.0 * 35.3 * 0.75 * 78.0 / 80.0) - 1.0).abs() < 0.01, "{brought}");
        // The pass takes longer than its weights, so it hardly waits for them.
        assert!(plan.waits < 0.1 * plan.seconds, "{gpus}: waits {} of {} s", plan.waits, plan.seconds);
    }
}

#[test]
fn a_70b_model_is_streamed_to_one_card_of_48_gb_or_24_gb() {
    for gpus in ["l40s", "a6000", "l4", "a10g"] {
        let plan = planned(&Task { residency: Some(Residency::Streamed), ..llama_70b() }, gpus);
        assert_eq!(plan.residency, Residency::Streamed, "{gpus}");
        assert!((plan.host_bytes as f64 / 1e9 - 35.3 - 2.1).abs() < 0.1, "{}", plan.host_bytes);
        let floor = plan.brought as f64 / 22e9;
        assert!(plan.seconds >= floor, "{gpus}: {} s for copies of {floor} s", plan.seconds);
    }
    // By themselves, cards of 48 GB hold the base.
    assert_eq!(planned(&llama_70b(), "a6000").residency, Residency::Resident);
    assert_eq!(planned(&llama_70b(), "l4").residency, Residency::Streamed);
    // An L40S computes faster than PCIe delivers weights, and the plan states the wait.
    let machine = gpu("l40s");
    let streamed = Task { residency: Some(Residency::Streamed), ..llama_70b() };
    let text = solve(&streamed, &machine).unwrap().table(&streamed, &machine);
    assert!(text.contains("streamed from") && text.contains(" at 22 GB/s beside"), "{text}");
}

#[test]
fn a_70b_model_fits_whole_on_one_card_of_80_gb() {
    for gpus in ["h100", "a100-80", "8xh100"] {
        let plan = planned(&llama_70b(), gpus);
        assert_eq!((plan.residency, plan.host_bytes, plan.waits), (Residency::Resident, 0, 0.0), "{gpus}");
        assert!((gigabytes("base", &plan) - 35.3).abs() < 0.1);
    }
}

#[test]
fn what_lies_elsewhere_is_chosen_only_where_it_can() {
    let task = llama_70b();
    // The host of a small instance holds no 35 GB.
    let refused = solve(&task, &card::machine("g6.xlarge", None).unwrap()).unwrap_err();
    assert_eq!(refused.kind, crate::fault::Kind::Capacity);
    let small = Machine { host: Some(40 << 30), ..gpu("l4") };
    assert_eq!(solve(&task, &small).unwrap().residency, Residency::Streamed);
    let four = Machine { ranks: 4, ..small };
    let streamed = Task { residency: Some(Residency::Streamed), ..task.clone() };
    let help = solve(&streamed, &four).unwrap_err().help.unwrap();
    assert!(help.contains("leave `residency` out") && help.contains("of host memory"), "{help}");
    let said = |task: Task, machine: &Machine| solve(&task, machine).unwrap_err().message;
    let shared = Task { residency: Some(Residency::Shared), ..task.clone() };
    assert!(said(shared.clone(), &gpu("l4")).starts_with("residency: shared: one process trains"));
    let bare = Task { quantization: Quantization::None, ..shared };
    assert!(said(bare, &gpu("l4")).contains("the base is not quantised"));
    // On a CPU nothing is gained from host memory, which is the same memory.
    let cpu = Machine { place: Place::Cpu { threads: 2 }, taken: 0, host: None, ..with_memory(16 << 30) };
    assert_eq!(solve(&task, &cpu).unwrap_err().kind, crate::fault::Kind::Capacity);
}

/// The next smaller plan leaves the weights where they were loaded.
#[test]
fn a_smaller_plan_does_not_move_the_weights() {
    let task = Task { residency: Some(Residency::Streamed), ..task(phi3_mini(), 4096) };
    let machine = gpu("l4");
    let mut plan = solve(&task, &machine).unwrap();
    while let Some(next) = next_smaller(&Task { residency: None, ..task.clone() }, &machine, &plan) {
        assert_eq!(next.residency, Residency::Streamed);
        plan = next;
    }
}

#[test]
fn ranks_lose_little_of_their_added_speed() {
    let of = |gpus: &str, facts: Facts| {
        let task = Task { example_tokens: 512, tokens_min: 512, ..task(facts, 4096) };
        planned(&task, gpus).efficiency
    };
    assert!((0.97..1.0 / 1.02).contains(&of("8xh100", phi3_mini())), "{}", of("8xh100", phi3_mini()));
    assert!((0.95..1.0 / 1.02).contains(&of("4xl4", phi3_mini())), "{}", of("4xl4", phi3_mini()));
    assert_eq!(of("h100", phi3_mini()), 1.0);
}

/// Compares the plan's bytes with the memory of real decoders, on the device and on the host.
#[test]
fn weights_take_what_the_plan_counts_wherever_they_lie() {
    use crate::model::residency::Home;
    let config = json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    });
    let facts = facts(config);
    let folder = tempfile::tempdir().unwrap();
    random::write(folder.path(), &facts, 3).unwrap();
    for double in [true, false] {
        let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double };
        let options = crate::model::Options {
            folder: folder.path().into(),
            quantization,
            lora: LoraOptions::default(),
            precision: Precision::F32,
        };
        let task = Task { quantization, ..task(facts.clone(), 64) };
        let silent = crate::report::Report::silent();
        let streamed = load::load_at(&Home::Host, facts.clone(), &options, &Device::Cpu, &silent).unwrap();
        let (ring, layers) = (streamed.ring.unwrap(), Layers { residency: Residency::Streamed, ranks: 1 });
        let gigantic = Machine { host: None, ..gpu("h200") };
        let solver = Solver::new(&task, &gigantic, Residency::Streamed);
        let plan = solver.smallest();
        let buffers = plan.terms.iter().find(|term| term.what.starts_with("two buffers")).unwrap().bytes;
        assert_eq!(buffers, ring.device_bytes() as u64);
        assert_eq!(layers.buffers(&task).iter().sum::<usize>(), ring.host_bytes());
        assert_eq!(plan.host_bytes, (ring.host_bytes() + 61 * 96 * 2) as u64);
        // Whole weights: the buffers' gaps and the second level of scales are apart.
        let resident = Solver::new(&task, &gigantic, Residency::Resident).smallest();
        assert!(resident.terms[1].bytes as usize <= ring.host_bytes() + 3 * 7 * 2 * 256, "{resident:?}");
    }
}

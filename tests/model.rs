//! `hone model` with the real binary: its output for folders as they come from the hub, and for KAITO's presets.

#[path = "support/job.rs"]
mod job;

use expect_test::expect;
use job::Work;

/// Returns the output for the folder `model`, after changes to it.
fn told(golden: &str, arguments: &[&str]) -> String {
    let work = Work::new();
    work.copy(&format!("{golden}/model"), "model");
    work.done(&[&["model", "model"], arguments].concat()).stdout
}

#[test]
fn a_folder_is_understood() {
    expect![[r#"
        model            model
        family           llama
        parameters       590464
        layers           2 of width 128, feed-forward 320
        heads            8 of queries, 2 of keys, of width 16
        window           none
        rope             theta 500000, llama3, factor 8 over 64 tokens, 16 of a head
        norms            RMS, eps 1e-5
        head             its own
        context          512 tokens
        vocabulary       1024 ids
        chat template    the tokenizer's
        weights          1.1 MiB, bfloat16 by config.json
        in 4 bits        14 linear layers with load_in_4bit (double): 165.2 KiB; the rest as stored
        LoRA sites       14 of rank 8, 34816 parameters: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        memory of a GPU  643.4 MiB at 1024 tokens a pass; 641.0 MiB with gradient_checkpointing
                         673.1 MiB at 4096 tokens a pass; 663.4 MiB with gradient_checkpointing
                         792.0 MiB at 16384 tokens a pass; 753.0 MiB with gradient_checkpointing
    "#]].assert_eq(&told("llama3", &[]));
}

#[test]
fn fused_modules_windows_and_chosen_targets() {
    let targets = ["--target-modules", "q_proj,k_proj,o_proj", "--rank", "32"];
    expect![[r#"
        model            model
        family           phi3
        parameters       590464
        layers           2 of width 128, feed-forward 256
        heads            8 of queries, 8 of keys, of width 16
        window           40 tokens
        rope             theta 10000, plain, 16 of a head
        norms            RMS, eps 1e-5
        head             its own
        context          4096 tokens
        vocabulary       1024 ids
        chat template    the tokenizer's
        weights          1.1 MiB, bfloat16 by config.json
        in 4 bits        8 linear layers with load_in_4bit (double): 165.1 KiB; the rest as stored
        LoRA sites       4 of rank 32, 49152 parameters: self_attn.qkv_proj, self_attn.o_proj
                         q_proj is part of qkv_proj
                         k_proj is part of qkv_proj
        memory of a GPU  643.2 MiB at 1024 tokens a pass; 640.7 MiB with gradient_checkpointing
                         672.0 MiB at 4096 tokens a pass; 661.9 MiB with gradient_checkpointing
                         786.9 MiB at 16384 tokens a pass; 746.4 MiB with gradient_checkpointing

        warnings:
          rank 32: vLLM serves ranks up to 16 unless it is started with --max-lora-rank 32 (KAITO: `vllm: {max-lora-rank: 32}` in the inference ConfigMap)
    "#]].assert_eq(&told("phi3", &targets));
}

#[test]
fn a_checkpoint_that_is_quantised_already() {
    expect![[r#"
        model            model
        family           llama
        parameters       82240
        layers           2 of width 64, feed-forward 64
        heads            4 of queries, 2 of keys, of width 16
        window           none
        rope             theta 10000, plain, 16 of a head
        norms            RMS, eps 1e-5
        head             tied
        context          2048 tokens
        vocabulary       512 ids
        chat template    the tokenizer's
        weights          106.6 KiB, bfloat16 by config.json
        in 4 bits        14 linear layers already, by bitsandbytes (nf4, scales too): 24.9 KiB
        LoRA sites       12 of rank 8, 11776 parameters: self_attn.q_proj, self_attn.k_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        memory of a GPU  636.4 MiB at 1024 tokens a pass; 635.4 MiB with gradient_checkpointing
                         648.7 MiB at 4096 tokens a pass; 644.7 MiB with gradient_checkpointing
                         697.7 MiB at 16384 tokens a pass; 681.8 MiB with gradient_checkpointing
    "#]].assert_eq(&told("llama_stored_nf4", &["--target-modules", r".*_proj(?<!v_proj)"]));
}

#[test]
fn the_language_model_inside_another() {
    expect![[r#"
        model            model
        family           gemma3_text, the language model of gemma3
        parameters       99008
        layers           2 of width 64, feed-forward 64
        heads            4 of queries, 1 of keys, of width 32
        window           24 tokens in 1 of 2 layers
        rope             theta 1000000, linear, factor 8, 32 of a head; then theta 10000, plain, 32 of a head
        norms            RMS, weight plus 1, eps 1e-6; of queries and keys
        head             tied
        context          2048 tokens
        vocabulary       512 ids
        chat template    the tokenizer's
        weights          193.4 KiB, bfloat16 by config.json
        in 4 bits        14 linear layers with load_in_4bit (double): 33.1 KiB; the rest as stored
        LoRA sites       14 of rank 8, 15360 parameters: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        memory of a GPU  638.4 MiB at 1024 tokens a pass; 636.6 MiB with gradient_checkpointing
                         656.4 MiB at 4096 tokens a pass; 649.0 MiB with gradient_checkpointing
                         728.2 MiB at 16384 tokens a pass; 698.6 MiB with gradient_checkpointing
    "#]].assert_eq(&told("gemma3_wrapper", &[]));
}

#[test]
fn what_is_missing_is_told_together() {
    let work = Work::new();
    work.copy("qwen3/model", "model");
    std::fs::remove_file(work.path("model/model.safetensors")).unwrap();
    std::fs::remove_file(work.path("model/tokenizer.json")).unwrap();
    work.write("model/pytorch_model.bin", "");
    expect![[r#"
        model            model
        family           qwen3
        parameters       132544
        layers           2 of width 64, feed-forward 128
        heads            4 of queries, 2 of keys, of width 32
        window           none
        rope             theta 1000000, plain, 32 of a head
        norms            RMS, eps 1e-6; of queries and keys
        head             tied
        context          2048 tokens
        vocabulary       528 rows, no tokenizer
        chat template    unknown without a tokenizer
        in 4 bits        14 linear layers with load_in_4bit (double): 49.6 KiB; the rest as stored
        LoRA sites       14 of rank 8, 19456 parameters: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        memory of a GPU  639.2 MiB at 1024 tokens a pass; 637.1 MiB with gradient_checkpointing
                         659.2 MiB at 4096 tokens a pass; 651.0 MiB with gradient_checkpointing
                         739.1 MiB at 16384 tokens a pass; 706.5 MiB with gradient_checkpointing

        missing:
          pytorch_model.bin is a pickle, which may run code and is not read: no model.safetensors in model
            help: save it as safetensors: transformers' from_pretrained(DIR).save_pretrained(NEW), or use a revision of the model that has them
          model: tokenizer.json is missing
            help: download the whole folder of the model, tokenizer included
    "#]].assert_eq(&work.done(&["model", "model"]).stdout);
    let json: serde_json::Value =
        serde_json::from_str(&work.done(&["model", "model", "--format", "json"]).stdout).unwrap();
    assert_eq!(json["missing"].as_array().unwrap().len(), 2);
    assert_eq!((json["family"].as_str(), json["weights"]["bytes"].as_u64()), (Some("qwen3"), None));
    assert_eq!(json["adapter"]["linear_layers"].as_array().unwrap().len(), 14);
}

#[test]
fn presets_by_any_name() {
    let work = Work::new();
    let mut told = work.done(&["model", "--preset", "microsoft/Phi-3-mini-4k-instruct"]).stdout;
    told += &work.done(&["model", "--preset", "falcon-7b"]).stdout;
    told += &work.done(&["model", "--preset", "gpt-oss-20b"]).stdout;
    let ended = work.run(&["--log", "terminal", "model", "--preset", "phi4-mini-instruct"]);
    assert_eq!(ended.code, Some(2));
    told += &ended.stderr;
    expect![[r#"
        preset          phi-3-mini-4k-instruct
        hub             microsoft/Phi-3-mini-4k-instruct at 0a67737cc96d2554230f90338b163bc6380a2a85
        family          phi3
        in KAITO        tuned v0.3 to v0.12
        weights         mcr.microsoft.com/aks/kaito/kaito-phi-3-mini-4k-instruct:0.2.0
        target_modules  k_proj, q_proj, v_proj, o_proj, gate_proj, down_proj, up_proj
        chat template   the tokenizer's
        context         4096 tokens
        preset          falcon-7b
        hub             tiiuae/falcon-7b at ec89142b67d748a1865ea4451372db8313ada0d8
        family          falcon
        in KAITO        tuned v0.3 to v0.10
        target_modules  query_key_value
        chat template   none: give ModelConfig.chat_template for conversations
        context         2048 tokens
        preset    gpt-oss-20b
        hub       openai/gpt-oss-20b
        family    none: mixture of experts
        in KAITO  only served
        error (usage, exit code 2): "phi4-mini-instruct" is not a preset
          help: did you mean phi-4-mini-instruct?
    "#]]
    .assert_eq(&told);
    let json = work.done(&["model", "--preset", "phi-4", "--format", "json"]).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["artifact"], "mcr.microsoft.com/aks/kaito/kaito-phi-4:0.2.0");
}

/// The checkpoint decides the form of its weights. Another setting gets a warning, and the adapter's card names the
/// base's form.
#[test]
fn a_quantised_checkpoint_is_trained_as_it_is() {
    let work = Work::new();
    work.copy("llama_stored_nf4/model", "model");
    work.copy("_data/messages.parquet", "data.parquet");
    let run = |output: &str, more: &[&str]| {
        let run = "run --log terminal --model model --name base/of-it --data data.parquet \
                   --set TrainingArguments.max_steps=1 --set TrainingArguments.max_length=64 --output";
        let arguments: Vec<&str> =
            run.split_whitespace().chain([output]).chain(more.iter().copied()).collect();
        work.done(&arguments).stderr
    };
    let asked = ["--set", "QuantizationConfig.load_in_4bit=true"];
    let said = run("nf4", &[]);
    assert!(said.contains("quantised already: nf4 with quantised scales, taken as it is\n"), "{said}");
    let said = run("fp4", &asked);
    assert!(said.contains("taken as it is; QuantizationConfig asks for another form"), "{said}");
    let bytes = |output: &str| work.read(&format!("{output}/adapter_model.safetensors"));
    assert!(bytes("nf4") == bytes("fp4"), "the same base");
    assert!(
        work.text("nf4/README.md")
            .contains("a 4-bit base (nf4, as bitsandbytes stored it in the checkpoint)")
    );
    assert_eq!(work.json("nf4/adapter_config.json")["base_model_name_or_path"], "base/of-it");
}

#[test]
fn kaitos_names_mean_fused_modules_or_literally_nothing() {
    let work = Work::new();
    work.copy("phi3/model", "model");
    work.copy("_data/messages.parquet", "data.parquet");
    let names = "LoraConfig.target_modules=[k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj]";
    let plan = |more: &[&str]| {
        let plan = ["plan", "--model", "model", "--data", "data.parquet", "--set", names];
        let told = work.done(&[&plan, more].concat()).stdout;
        told.lines().find(|line| line.starts_with("adapter:")).unwrap().to_owned()
    };
    assert_eq!(plan(&[]), "adapter: 8 linear layers, 28672 trainable parameters");
    let literal = plan(&["--target-matching", "literal"]);
    assert_eq!(literal, "adapter: 4 linear layers, 10240 trainable parameters");
}

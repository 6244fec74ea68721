//! Refusals of hone, run with the real binary: the exit code, every word of the message, and that nothing has a final
//! name or is in a registry afterwards.

#[path = "support/http.rs"]
mod http;
#[path = "support/job.rs"]
mod job;
#[path = "support/registry.rs"]
mod registry;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Field;
use expect_test::expect;
use http::{Reply, Server};
use job::{Ended, FINAL, Running, Work};
use parquet::arrow::ArrowWriter;
use registry::{Registry, Setup};
use safetensors::tensor::{Dtype, SafeTensors, View};

/// The settings of a short run over `model/`, so that the message is about what a test changes.
const RUN: &str = "run --quiet --log terminal --model model --output out --set TrainingArguments.max_steps=2";

/// Returns a run with these further arguments, none of which contains a blank.
fn run(work: &Work, arguments: &str) -> Ended {
    work.run(&RUN.split(' ').chain(arguments.split_whitespace()).collect::<Vec<_>>())
}

/// Returns the output of a run that must fail. Nothing has a final name then.
fn refused(work: &Work, arguments: &str) -> String {
    let ended = run(work, arguments);
    let code = ended.stderr.split("exit code ").nth(1).and_then(|rest| rest.split(')').next());
    assert_eq!(code.and_then(|code| code.parse().ok()), ended.code, "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    nothing_final(work);
    let termination = work.json("termination.json");
    assert_eq!(termination["code"].as_i64(), ended.code.map(i64::from), "{termination}");
    assert!(ended.stderr.contains(termination["kind"].as_str().unwrap()), "{termination}");
    steady(&ended.stderr)
}

fn nothing_final(work: &Work) {
    let found: Vec<String> =
        work.list("out").into_iter().filter(|name| FINAL.contains(&name.as_str())).collect();
    assert!(found.is_empty(), "after a refusal there is {found:?}");
}

/// Replaces ports, temporary folders and waits before another attempt, which differ from run to run.
fn steady(text: &str) -> String {
    let text =
        regex::Regex::new(r"(localhost|127\.0\.0\.1):\d+").unwrap().replace_all(text, "$1:PORT").into_owned();
    let text = regex::Regex::new(r"again in [0-9.]+ ?m?s").unwrap().replace_all(&text, "again in a moment");
    regex::Regex::new(r"/tmp/\.tmp\w+").unwrap().replace_all(&text, "TMP").into_owned()
}

// ---- configuration ----

/// A build with the `cuda` feature asks the driver instead; `tests/gpu` covers its messages.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_gpu_is_refused_by_a_build_for_the_cpu() {
    let work = Work::with_llama();
    expect![[r#"
        error (config, exit code 10): device cuda:0: this build of hone trains on the CPU only
          help: use the CUDA image, build with --features cuda, or remove `device`
    "#]]
    .assert_eq(&refused(&work, "--data data.parquet --device cuda:0"));
}

#[test]
fn products_in_8_bits_are_refused_on_a_cpu() {
    let work = Work::with_llama();
    expect![[r#"
        error (config, exit code 10): compute: fp8: this CPU has no products in 8 bits: found no GPU, expected a GPU of compute capability 8.9 or later
          help: remove `compute`, or use an L4, L40S, RTX 4090, H100, H200 or newer GPU
    "#]]
    .assert_eq(&refused(&work, "--data data.parquet --device cpu --set compute=fp8"));
}

#[test]
fn configuration_is_refused_before_anything_is_read() {
    let mut said = String::new();
    let work = Work::with_llama();
    work.write(
        "misspelt.yaml",
        "training_config:\n  LoraConfig:\n    r: 8\n    lora_aplha: 16\n  TrainingArgument:\n    max_steps: 3\n",
    );
    said += &refused(&work, "--data data.parquet --config misspelt.yaml");
    let both = ["load_in_4bit", "load_in_8bit"].map(|key| format!("QuantizationConfig.{key}=true"));
    said += &refused(&work, &format!("--data data.parquet --set {} --set {}", both[0], both[1]));
    said += &refused(&work, "");
    said += &refused(&work, "--data data.parquet --device tpu");
    said += &refused(&work, "--data data.parquet --set LoraConfig.target_modules=[qproj]");
    assert!(!work.path("out").exists());
    expect![[r#"
        error (config, exit code 10): 2 mistakes in the configuration
          misspelt.yaml:4:5: LoraConfig.lora_aplha is not a key; did you mean lora_alpha?
          misspelt.yaml:5:3: "TrainingArgument" is not a section; did you mean TrainingArguments?
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): --set: QuantizationConfig: load_in_4bit and load_in_8bit are both true; choose load_in_4bit
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): no dataset: name its files with `data` (--data URL_OR_PATH)
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): --device: device: expected auto, cpu, cuda or cuda:N, found "tpu"
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): LoraConfig.target_modules matches no linear layer of this llama model; it has self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj in layers 0 to 1
          help: name some of these layers (the last part of a path is enough), or use "all-linear"
    "#]].assert_eq(&said);
}

#[test]
fn a_model_that_is_not_there_is_refused() {
    let mut said = String::new();
    let work = Work::new();
    work.copy("_data/messages.parquet", "data.parquet");
    said += &refused(&work, "--data data.parquet");
    said += &refused(&work, "--data data.parquet --set model=microsoft/phi-4");
    work.write("model/README.md", "");
    said += &refused(&work, "--data data.parquet");
    expect![[r#"
        error (config, exit code 10): --model: model: there is no folder model
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): --set: model: there is no folder microsoft/phi-4; if it is on the Hugging Face hub, write hf://microsoft/phi-4
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        error (config, exit code 10): --model: model: model holds no config.json; expected a Hugging Face model folder
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
    "#]].assert_eq(&said);
}

#[test]
fn weights_that_are_not_read_are_refused_with_what_to_take() {
    let mut said = String::new();
    let work = Work::with_llama();
    let config = work.json("model/config.json");
    let mut quantised = |section: serde_json::Value| {
        let mut config = config.clone();
        config["quantization_config"] = section;
        work.write("model/config.json", config.to_string());
        said += &refused(&work, "--data data.parquet");
    };
    quantised(serde_json::json!({"quant_method": "gptq", "bits": 4}));
    quantised(serde_json::json!({"quant_method": "bitsandbytes", "load_in_8bit": true}));
    quantised(serde_json::json!({"quant_method": "fp8"}));
    work.write("model/config.json", config.to_string());
    std::fs::remove_file(work.path("model/model.safetensors")).unwrap();
    work.write("model/pytorch_model.bin", "");
    said += &refused(&work, "--data data.parquet");
    work.write("model/model.Q4_K_M.gguf", "");
    said += &refused(&work, "--data data.parquet");
    expect![[r#"
        error (model, exit code 12): config.json: quantization_config: the checkpoint is quantised by gptq, expected f32, f16 or bf16 weights, or 4-bit weights from bitsandbytes
          help: use the model it was made from (base_model on its hub page); hone quantises it itself
        error (model, exit code 12): config.json: quantization_config: the checkpoint is quantised by bitsandbytes to 8 bits, expected f32, f16 or bf16 weights, or 4-bit weights from bitsandbytes
          help: use the model it was made from (base_model on its hub page); hone quantises it itself
        error (model, exit code 12): config.json: quantization_config: the checkpoint is quantised by fp8, expected f32, f16 or bf16 weights, or 4-bit weights from bitsandbytes
          help: use a bf16 copy of the model, which its makers or others often publish; hone quantises it itself
        error (model, exit code 12): pytorch_model.bin is a pickle, which may run code and is not read: no model.safetensors in model
          help: save it as safetensors: transformers' from_pretrained(DIR).save_pretrained(NEW), or use a revision of the model that has them
        error (model, exit code 12): model.Q4_K_M.gguf is a file for inference: no model.safetensors in model
          help: use the model it was made from (base_model on its hub page), as safetensors
    "#]].assert_eq(&said);
}

#[test]
fn models_that_are_not_trained_are_refused_by_name() {
    let mut said = String::new();
    let work = Work::with_llama();
    for kind in ["mixtral", "qwen3_moe", "phimoe", "gpt_oss", "qwen2_5_vl", "t5"] {
        work.write("model/config.json", format!(r#"{{"model_type": "{kind}"}}"#));
        said += &refused(&work, "--data data.parquet");
    }
    expect![[r#"
        error (model, exit code 12): model/config.json: model_type: found "mixtral", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train mixture-of-experts models; use a dense model
        error (model, exit code 12): model/config.json: model_type: found "qwen3_moe", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train mixture-of-experts models; use a dense model
        error (model, exit code 12): model/config.json: model_type: found "phimoe", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train mixture-of-experts models; use a dense model
        error (model, exit code 12): model/config.json: model_type: found "gpt_oss", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train mixture-of-experts models; use a dense model
        error (model, exit code 12): model/config.json: model_type: found "qwen2_5_vl", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train this multimodal model; use a text model from the same makers
        error (model, exit code 12): model/config.json: model_type: found "t5", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: use a model of a supported family
    "#]].assert_eq(&said);
}

// ---- data ----

/// Writes a file of one text column.
fn texts(work: &Work, name: &str, column: &str, rows: &[&str]) {
    let array: ArrayRef = Arc::new(StringArray::from(rows.to_vec()));
    write_parquet(work, name, &RecordBatch::try_from_iter([(column, array)]).unwrap());
}

/// Writes a conversation without an answer.
fn questions(work: &Work, name: &str) {
    let text = |text: &str| Arc::new(StringArray::from(vec![text])) as ArrayRef;
    let message = StructArray::try_from(vec![("role", text("user")), ("content", text("what?"))]).unwrap();
    let item = Arc::new(Field::new("item", message.data_type().clone(), true));
    let one = OffsetBuffer::from_lengths([1]);
    let list: ArrayRef = Arc::new(ListArray::new(item, one, Arc::new(message), None));
    write_parquet(work, name, &RecordBatch::try_from_iter([("messages", list)]).unwrap());
}

fn write_parquet(work: &Work, name: &str, batch: &RecordBatch) {
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    work.write(name, bytes);
}

#[test]
fn data_that_teaches_nothing_is_refused() {
    let mut said = String::new();
    let work = Work::with_llama();
    texts(&work, "column.parquet", "question", &["what?"]);
    said += &refused(&work, "--data column.parquet");
    texts(&work, "empty.parquet", "text", &[]);
    said += &refused(&work, "--data empty.parquet");
    said += &refused(&work, "--data data.parquet --set TrainingArguments.max_length=2");
    texts(&work, "short.parquet", "text", &["", ""]);
    said += &refused(&work, "--data short.parquet");
    questions(&work, "questions.parquet");
    said += &refused(&work, "--data questions.parquet");
    said += &refused(&work, "--data questions.parquet --set DatasetConfig.train_test_split=1");
    said += &refused(&work, "--data no-such.parquet");
    said += &refused(&work, "--data no-such/*.parquet");
    said += &refused(&work, "--data data.parquet --layout text");
    expect![[r#"
        error (data, exit code 11): column.parquet: there is `question` but no `answer` (name it with DatasetConfig.response_column); columns found: `question`: Utf8
          help: rename the columns, or name them with DatasetConfig.messages_column, DatasetConfig.context_column, DatasetConfig.response_column, TrainingArguments.dataset_text_field, question_column
        error (data, exit code 11): the dataset has 0 rows in 1 file(s): empty.parquet
          help: check the export that wrote the files, and the path or URL they were taken from
        error (data, exit code 11): nothing left to supervise: 400 rows, 400 of them cut to 2 tokens (longest 489), none with an answer left
          help: raise max_length, or check that the conversations have assistant turns that are learned
        error (data, exit code 11): 2 of 2 rows cannot be used:
          2 x the text is empty (short.parquet:0, short.parquet:1)
          help: correct these rows, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)
        error (config, exit code 10): DatasetConfig.train_test_split: 0.8 splits 1 row(s) into 0 to train on and 1 to evaluate on
          help: use a share that leaves rows on both sides, or 1 for no evaluation
        error (data, exit code 11): nothing left to supervise: 1 rows, 0 of them cut to 1024 tokens (longest 35), none with an answer left
          help: raise max_length, or check that the conversations have assistant turns that are learned
        error (data, exit code 11): no-such.parquet: no such file or folder
          help: check the path and, in a container, the mount
        error (data, exit code 11): no-such/*.parquet: no file matches
          help: check the path and, in a container, the mount
        error (data, exit code 11): data.parquet: no column has a name that is known; columns found: `messages`: List(Struct("content": Utf8, "role": Utf8), field: 'element'); expected `text`: a string
          help: rename the columns, or name them with TrainingArguments.dataset_text_field
    "#]].assert_eq(&said);
}

/// Rows that are right but in another place or shape: the message names the form that is read.
#[test]
fn data_that_is_meant_but_not_written_so_is_told_how() {
    let work = Work::with_llama();
    work.write("pandas.json", r#"{"question": {"0": "q", "1": "r"}, "answer": {"0": "a", "1": "b"}}"#);
    let numbers = |letter: &str| {
        let pairs: Vec<String> = (0..1200).map(|row| format!("\"{row}\": \"{letter}\"")).collect();
        pairs.join(", ")
    };
    let many = format!("{{\"question\": {{{}}}, \"answer\": {{{}}}}}", numbers("q"), numbers("a"));
    work.write("many.json", many);
    work.write("wrapped.json", r#"{"version": "1", "data": [{"question": "q", "answer": "a"}]}"#);
    work.write("bar.csv", "question|answer\nq|a\n");
    work.write("sheet.xlsx", [b"PK\x03\x04".as_slice(), &[0; 26], b"[Content_Types].xml"].concat());
    for (data, told) in [
        ("pandas.json", "orient=\"records\""),
        ("many.json", "orient=\"records\""),
        ("wrapped.json", "the list `data` seems to hold the rows"),
        ("bar.csv", "the header is one column"),
        ("sheet.xlsx", "save the sheet as CSV in UTF-8"),
        ("owner/name", "write hf://datasets/owner/name"),
        ("hf://owner/name", "write hf://datasets/owner/name"),
        ("data.parquet#limt=2", "is no setting: write sha256=, layout="),
        ("data.parquet,bar.csv", "repeat --data for each file"),
    ] {
        let said = refused(&work, &format!("--data {data}"));
        assert!(said.contains(told), "{data}: {said}");
    }
}

#[test]
fn damaged_data_is_refused() {
    let mut said = String::new();
    let work = Work::with_llama();
    let whole = work.read("data.parquet");
    work.write("cut.parquet", &whole[..whole.len() / 2]);
    said += &refused(&work, "--data cut.parquet");
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 1;
    work.write("flipped.parquet", &flipped);
    let pinned = format!("flipped.parquet#sha256={}", hone::source::digest(&whole));
    said += &refused(&work, &format!("--data {pinned}"));
    work.write("page.parquet", "<!DOCTYPE html><html><title>Sign in</title></html>");
    said += &refused(&work, "--data page.parquet");
    expect![[r#"
        error (data, exit code 11): cut.parquet: a truncated parquet file: 15405 bytes that do not end with PAR1 but with 0b 1a a9 30
          help: fetch or export the file again
        error (data, exit code 11): flipped.parquet: sha256 is 7d1c3fe5b1332daa1870898da916ea76af2823716f88567ffc830ba2024fb74a, expected 77d3fbc64af9e19448ce45965ed14c9f77fa626891e3093befa4e98498b3dd42
          help: the file was changed or damaged, or the digest belongs to another version
        error (data, exit code 11): page.parquet: not a parquet file but an HTML page (it begins with 3c 21 44 4f 43 54 59 50)
          help: check the path or URL, and whether it needs a login
    "#]].assert_eq(&said);
}

#[test]
fn what_a_server_gives_instead_of_data_is_refused() {
    let mut said = String::new();
    let work = Work::with_llama();
    let data = work.read("data.parquet");
    let server = Server::start(move |_, request| match request.target.as_str() {
        "/page.parquet" => Reply::ok("<!DOCTYPE html><html><title>Sign in</title></html>")
            .header("Content-Type", "text/html; charset=utf-8"),
        "/secret.parquet" => Reply::status(403),
        "/login.parquet" => Reply::status(401),
        "/data.parquet" => Reply::ok(data.clone()),
        _ => Reply::status(404),
    });
    said += &refused(&work, &format!("--data {}", server.url("/page.parquet")));
    said += &refused(&work, &format!("--data {}", server.url("/missing.parquet")));
    said += &refused(&work, &format!("--data {}", server.url("/secret.parquet")));
    said += &refused(&work, &format!("--data {}", server.url("/login.parquet")));
    let pinned = format!("{}#sha256={}", server.url("/data.parquet"), "0123456789abcdef".repeat(4));
    said += &refused(&work, &format!("--data {pinned}"));
    said += &refused(&work, &format!("--data {} --file-bytes-max 1000", server.url("/data.parquet")));
    expect![[r#"
        error (data, exit code 11): http://localhost:PORT/page.parquet: URL returned an HTML page (title: Sign in), expected a parquet file
          help: this may be a login page or a preview link; use the raw/resolve link
        error (data, exit code 11): http://localhost:PORT/missing.parquet: the server has no such file (HTTP 404)
          help: check the URL; some servers answer 404 if a login is missing
        error (auth, exit code 13): http://localhost:PORT/secret.parquet: access refused (HTTP 403)
          help: the server requires credentials; give a signed URL, or one that needs none
        error (auth, exit code 13): http://localhost:PORT/login.parquet: access refused (HTTP 401)
          help: the server requires credentials; give a signed URL, or one that needs none
        download  warning: http://localhost:PORT/data.parquet: its sha256 is 77d3fbc64af9e19448ce45965ed14c9f77fa626891e3093befa4e98498b3dd42, not the expected one; again in a moment
        error (data, exit code 11): http://localhost:PORT/data.parquet: sha256 is 77d3fbc64af9e19448ce45965ed14c9f77fa626891e3093befa4e98498b3dd42, expected 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
          help: the file was changed or damaged, or the digest belongs to another version
        error (capacity, exit code 14): http://localhost:PORT/data.parquet: at least 30811 bytes, the limit for one file is 1000 (1000 B)
          help: raise file_bytes_max (--file-bytes-max) if the file is meant to be that large
    "#]].assert_eq(&said);
}

#[test]
fn a_data_host_that_does_not_answer_is_a_matter_of_time() {
    let work = Work::with_llama();
    let url = format!("http://localhost:{}/data.parquet", http::unused_port());
    let said = refused(&work, &format!("--data {url}"));
    expect![[r#"
        download  warning: http://localhost:PORT/data.parquet: localhost refused the connection; again in a moment
        download  warning: http://localhost:PORT/data.parquet: localhost refused the connection; again in a moment
        download  warning: http://localhost:PORT/data.parquet: localhost refused the connection; again in a moment
        download  warning: http://localhost:PORT/data.parquet: localhost refused the connection; again in a moment
        download  warning: http://localhost:PORT/data.parquet: localhost refused the connection; again in a moment
        error (network, exit code 20): http://localhost:PORT/data.parquet: gave up at attempt 6: localhost refused the connection
          help: the bytes received so far are kept; run it again when the server answers
    "#]].assert_eq(&said);
}

// ---- model ----

/// A tensor to write.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Returns the golden Llama with its tensors changed.
fn with_tensors(change: impl FnOnce(&mut HashMap<String, Stored>)) -> Work {
    let work = Work::with_llama();
    let file = work.read("model/model.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let stored = |(name, view): (String, safetensors::tensor::TensorView)| {
        let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (name, Stored { dtype, shape, bytes })
    };
    let mut tensors: HashMap<String, Stored> = tensors.tensors().into_iter().map(stored).collect();
    change(&mut tensors);
    work.write("model/model.safetensors", safetensors::serialize(&tensors, None).unwrap());
    work
}

/// Returns the golden Llama with its config.json changed.
fn with_json(file: &str, change: impl FnOnce(&mut serde_json::Value)) -> Work {
    let work = Work::with_llama();
    let mut json = work.json(file);
    change(&mut json);
    work.write(file, json.to_string());
    work
}

#[test]
fn weights_that_do_not_fit_their_config_are_refused() {
    let mut said = String::new();
    let missing = with_tensors(|tensors| {
        tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        tensors.remove("model.norm.weight").unwrap();
    });
    said += &refused(&missing, "--data data.parquet");
    let surplus = with_tensors(|tensors| {
        let bytes = vec![0; 256];
        let bias = Stored { dtype: Dtype::BF16, shape: vec![128], bytes };
        tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), bias);
    });
    said += &refused(&surplus, "--data data.parquet");
    let shape = with_tensors(|tensors| {
        tensors.get_mut("model.layers.0.mlp.down_proj.weight").unwrap().shape.reverse();
    });
    said += &refused(&shape, "--data data.parquet");
    let nan = with_tensors(|tensors| {
        let query = tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap();
        query.bytes[200..202].copy_from_slice(&0x7fc0u16.to_le_bytes());
    });
    said += &refused(&nan, "--data data.parquet --set QuantizationConfig.load_in_4bit=true");
    said += &refused(&nan, "--data data.parquet");
    let cut = Work::with_llama();
    let file = cut.read("model/model.safetensors");
    cut.write("model/model.safetensors", &file[..file.len() / 2]);
    said += &refused(&cut, "--data data.parquet");
    expect![[r#"
        error (model, exit code 12): the checkpoint does not fit config.json; tensors 2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight
          help: config.json and the safetensors files must be of the same model: download both again
        error (model, exit code 12): the checkpoint does not fit config.json; tensors 1 surplus: model.layers.0.self_attn.q_proj.bias
          help: config.json and the safetensors files must be of the same model: download both again
        error (model, exit code 12): model/model.safetensors: model.layers.0.mlp.down_proj.weight: found shape [320, 128], expected [128, 320] by config.json
          help: config.json and the safetensors files must be of the same model: download both again
        error (model, exit code 12): model.layers.0.self_attn.q_proj.weight: value 100 is NaN, expected finite weights
          help: the checkpoint is damaged: download it again
        error (model, exit code 12): model.layers.0.self_attn.q_proj.weight: value 100 is NaN, expected finite weights
          help: the checkpoint is damaged: download it again
        error (model, exit code 12): model/model.safetensors: not a whole safetensors file: incomplete metadata, file not fully covered
          help: download it again
    "#]].assert_eq(&said);
}

#[test]
fn models_of_other_families_are_refused() {
    let mut said = String::new();
    let other =
        |model_type: &str| with_json("model/config.json", |config| config["model_type"] = model_type.into());
    said += &refused(&other("mamba"), "--data data.parquet");
    let experts = with_json("model/config.json", |config| {
        config["model_type"] = "mixtral".into();
        config["num_local_experts"] = 8.into();
    });
    said += &refused(&experts, "--data data.parquet");
    expect![[r#"
        error (model, exit code 12): model/config.json: model_type: found "mamba", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: use a model of a supported family
        error (model, exit code 12): model/config.json: model_type: found "mixtral", expected one of falcon, gemma2, gemma3_text, granite, llama, ministral, ministral3, mistral, olmo2, phi, phi3, qwen2, qwen3, smollm3
          help: hone cannot train mixture-of-experts models; use a dense model
    "#]].assert_eq(&said);
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let mut said = String::new();
    let template = "{{ raise_exception('roles must alternate') }}";
    let raises = with_json("model/tokenizer_config.json", |config| config["chat_template"] = template.into());
    said += &refused(&raises, "--data data.parquet");
    let broken =
        with_json("model/tokenizer_config.json", |config| config["chat_template"] = "{% if %}".into());
    said += &refused(&broken, "--data data.parquet");
    let none = with_json("model/tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template").unwrap();
    });
    said += &refused(&none, "--data data.parquet");
    let larger = with_json("model/tokenizer.json", |tokenizer| {
        let mut added = tokenizer["added_tokens"][0].clone();
        (added["id"], added["content"]) = (1024.into(), "<|new|>".into());
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    });
    said += &refused(&larger, "--data data.parquet");
    let gone = Work::with_llama();
    std::fs::remove_file(gone.path("model/tokenizer.json")).unwrap();
    said += &refused(&gone, "--data data.parquet");
    expect![[r#"
        error (data, exit code 11): 400 of 400 rows cannot be used:
          400 x the chat template refuses it: roles must alternate (data.parquet:0, data.parquet:1, data.parquet:2, ...)
          help: correct these rows, set ModelConfig.chat_template, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)
        error (model, exit code 12): the model's chat template: the chat template fails at line 1: syntax error: unexpected end of block
          help: set ModelConfig.chat_template
        error (config, exit code 10): the dataset holds conversations but the model has no chat template
          help: set ModelConfig.chat_template, or use the instruction-tuned variant of the model
        error (model, exit code 12): tokenizer.json has ids up to 1024, the model's embedding only up to 1023 (vocab_size 1024)
          help: tokenizer.json and config.json must be of the same model; added tokens need a resized model
        error (model, exit code 12): model: tokenizer.json is missing
          help: download the whole folder of the model, tokenizer included
    "#]].assert_eq(&said);
}

// ---- output ----

#[test]
fn folders_of_others_are_left_alone() {
    let work = Work::with_llama();
    work.write("out/thesis.tex", "x");
    let mut said = refused(&work, "--data data.parquet");
    assert_eq!(work.list("out"), ["thesis.tex"]);

    let work = Work::with_llama();
    assert_eq!(run(&work, "--data data.parquet").code, Some(0));
    let before = work.read("out/adapter_model.safetensors");
    let other = run(&work, "--data data.parquet --set LoraConfig.r=4");
    assert_eq!(other.code, Some(10));
    said += &other.stderr;
    said += &run(&work, "--data data.parquet --set TrainingArguments.max_steps=3").stderr;
    assert_eq!(work.read("out/adapter_model.safetensors"), before);
    expect![[r#"
        error (config, exit code 10): the output folder out holds files that are not hone's: thesis.tex
          help: use another output folder: nothing in this one is touched
        error (config, exit code 10): the output folder out holds the adapter of another run, whose model, data or options differ from these
          help: use another output folder, remove this one, or set earlier_results: move
        error (config, exit code 10): the output folder out holds the adapter of another run, whose model, data or options differ from these: TrainingArguments.max_steps was 2 and is 3
          help: use another output folder, remove this one, or set earlier_results: move
    "#]].assert_eq(&said);
}

#[test]
fn after_a_mistake_the_same_folder_serves_again() {
    let work = Work::with_llama();
    let mistaken = refused(&work, "--data data.parquet --set TrainingArguments.max_length=2");
    assert!(mistaken.contains("nothing left to supervise"), "{mistaken}");
    let corrected = run(&work, "--data data.parquet");
    assert_eq!(corrected.code, Some(0), "{}", corrected.stderr);
}

#[test]
fn one_folder_serves_one_process() {
    let work = Work::with_llama();
    let first = "run --model model --output out --data data.parquet --set TrainingArguments.max_steps=100000";
    let mut first: Running = work.start(&first.split(' ').collect::<Vec<_>>());
    first.until("record", || work.path("out/hone.json").exists());
    let said = refused(&work, "--data data.parquet");
    expect![[r#"
        error (storage, exit code 21): out is still in use by another hone after 20s
          help: start it again when the other one has ended, or use another output folder
    "#]]
    .assert_eq(&said);
}

// ---- training ----

#[test]
fn a_loss_that_is_no_number_ships_nothing() {
    let mut said = String::new();
    let work = Work::with_llama();
    let registry = Registry::start(Setup::default());
    let image = format!("{}/diverged:v1", registry.host);
    said += &refused(
        &work,
        &format!(
            "--data data.parquet --push {image} --plain-http --set LoraConfig.lora_alpha=1e36 --set TrainingArguments.save_strategy=no"
        ),
    );
    assert!(!registry.path("data/docker/registry/v2/repositories/diverged").exists());
    expect![[r#"
        error (diverged, exit code 15): training diverged at step 2: loss NaN, gradient norm NaN
          help: lower TrainingArguments.learning_rate or add warmup_steps; no adapter was written
    "#]]
    .assert_eq(&said);
}

// ---- registry ----

/// Returns the output of a run that cannot push, and its exit code. The adapter is whole.
fn not_pushed(work: &Work, arguments: &str) -> (String, Option<i32>) {
    let ended = run(work, &format!("--data data.parquet {arguments}"));
    for name in FINAL {
        assert!(work.path("out").join(name).exists(), "{name} is kept");
    }
    assert!(!ended.stderr.contains(registry::PASSWORD));
    (steady(&ended.stderr), ended.code)
}

#[test]
fn a_registry_that_wants_other_credentials_is_refused_and_the_adapter_kept() {
    let work = Work::with_llama();
    let registry = Registry::start(Setup { tls: true, password: true, ..Default::default() });
    let (authority, wrong) = (registry.path("ca.crt"), registry.login("wrong"));
    let push = format!("--push {}/team/a:v1 --ca-file {}", registry.host, authority.display());
    let (wrong, wrong_code) = not_pushed(&work, &format!("{push} --docker-config {}", wrong.display()));
    let (none, none_code) = not_pushed(&work, &push);
    assert_eq!((wrong_code, none_code), (Some(13), Some(13)));
    assert!(!registry.path("data/docker").exists());
    expect![[r#"
        error (auth, exit code 13): localhost:PORT/team/a:v1: upload: the registry refused (credentials of TMP/login-5.json): HTTP 401: UNAUTHORIZED: authentication required
          help: give credentials that may push to this repository; the adapter is safe in out; run `hone push out localhost:PORT/team/a:v1`
        error (auth, exit code 13): localhost:PORT/team/a:v1: upload: the registry refused (no credentials: no docker config.json was found): HTTP 401: UNAUTHORIZED: authentication required
          help: give credentials that may push to this repository; the adapter is safe in out; run `hone push out localhost:PORT/team/a:v1`
    "#]].assert_eq(&(wrong + &none));
}

#[test]
fn a_registry_that_forbids_is_refused() {
    let work = Work::with_llama();
    let server = Server::start(|_, _| {
        let body = r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#;
        Reply::status(403).body(body).header("Content-Type", "application/json")
    });
    let host = server.url("").trim_start_matches("http://").to_owned();
    let (said, code) = not_pushed(&work, &format!("--push {host}/team/a:v1 --plain-http"));
    assert_eq!(code, Some(13));
    expect![[r#"
        error (auth, exit code 13): localhost:PORT/team/a:v1: upload: the registry refused (no credentials: no docker config.json was found): HTTP 403: DENIED: requested access to the resource is denied
          help: give credentials that may push to this repository; the adapter is safe in out; run `hone push out localhost:PORT/team/a:v1`
    "#]].assert_eq(&said);
}

#[test]
fn a_registry_that_does_not_answer_leaves_only_the_push_to_do() {
    let work = Work::with_llama();
    let image = format!("localhost:{}/team/a:v1", http::unused_port());
    let (said, code) = not_pushed(&work, &format!("--push {image} --plain-http"));
    assert_eq!(code, Some(23));
    expect![[r#"
        push      warning: upload: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111); again in a moment
        push      warning: upload: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111); again in a moment
        push      warning: upload: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111); again in a moment
        push      warning: upload: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111); again in a moment
        push      warning: upload: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111); again in a moment
        error (push, exit code 23): localhost:PORT/team/a:v1: upload failed after 6 attempts: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111)
          help: the adapter is safe in out; run `hone push out localhost:PORT/team/a:v1`
    "#]].assert_eq(&said);
    let (weights, metrics) = (work.read("out/adapter_model.safetensors"), work.read("out/metrics.jsonl"));

    let registry = Registry::start(Setup::default());
    let image = format!("{}/team/a:v1", registry.host);
    let talking = RUN.replace("--quiet ", "");
    let again = format!("{talking} --data data.parquet --push {image} --plain-http");
    let again = work.done(&again.split(' ').collect::<Vec<_>>());
    assert!(again.stderr.contains("already trained"), "{}", again.stderr);
    assert!(!again.stderr.contains("train     step"), "{}", again.stderr);
    assert_eq!(
        (weights, metrics),
        (work.read("out/adapter_model.safetensors"), work.read("out/metrics.jsonl"))
    );
    assert!(registry.path("data/docker/registry/v2/repositories/team/a").exists());
}

#[test]
fn an_image_name_is_checked_before_training() {
    let mut said = String::new();
    let work = Work::with_llama();
    let files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let server = Server::files(files);
    said += &refused(&work, &format!("--data {} --push Not:An:Image", server.url("/x.parquet")));
    assert!(server.requests().is_empty());
    expect![[r#"
        error (config, exit code 10): --push: image `Not:An:Image` is not a valid reference: expected [registry[:port]/]repository[:tag]; write `registry.example.com/team/adapter:v1`
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
    "#]].assert_eq(&said);
}

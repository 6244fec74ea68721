//! Writes everything that is needed to try hone: a tiny model with its tokenizer, a dataset, a configuration.
//!
//! The model's weights are random (from a fixed seed) and its tokenizer is byte-level, so that nothing is downloaded.
//! The adapter still learns the dataset's form within seconds.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::facts::config::Config;
use crate::facts::family;
use crate::fault::{Fault, Result};
use crate::model::random;

const DATA: &[u8] = include_bytes!("../examples/quickstart/data.parquet");
const SPECIALS: [&str; 4] = ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"];
const SEED: u64 = 7;

/// Writes `model/`, `data.parquet` and `hone.yaml` below `folder`, and returns the path of `hone.yaml`.
pub fn write(folder: &Path) -> Result<PathBuf> {
    if folder.exists() && std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Fault::config(format!("{} is not empty", folder.display()))
            .help("name a new folder: the example does not overwrite"));
    }
    let model = folder.join("model");
    std::fs::create_dir_all(&model).map_err(|error| Fault::storage("create", &model, &error))?;
    let config = config();
    random::write(&model, &family::describe(&Config::from_json(config.clone()))?, SEED)?;
    put(&model.join("config.json"), &pretty(&Value::Object(config)))?;
    put(&model.join("tokenizer.json"), &pretty(&tokenizer()))?;
    put(&model.join("tokenizer_config.json"), &pretty(&tokenizer_config()))?;
    put(&folder.join("data.parquet"), DATA)?;
    let spec = folder.join("hone.yaml");
    put(&spec, yaml(folder).as_bytes())?;
    Ok(spec)
}

fn put(file: &Path, content: &[u8]) -> Result<()> {
    std::fs::write(file, content).map_err(|error| Fault::storage("write", file, &error))
}

fn pretty(value: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("texts and numbers")
}

fn config() -> Map<String, Value> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": 260, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": false,
        "bos_token_id": null, "eos_token_id": 258,
    });
    config.as_object().expect("an object").clone()
}

/// Returns a byte-level BPE tokenizer without merges: each byte is a token, written in GPT-2's alphabet.
fn tokenizer() -> Value {
    let vocab: Map<String, Value> =
        alphabet().into_iter().enumerate().map(|(id, c)| (c.to_string(), Value::from(id))).collect();
    let added = SPECIALS.iter().enumerate().map(|(i, content)| {
        json!({"id": 256 + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// Returns GPT-2's character for each byte: printable bytes stand for themselves, the others for characters from U+0100
/// on.
fn alphabet() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0u32..256)
        .map(|byte| match printable(byte) {
            true => char::from_u32(byte).expect("Latin-1"),
            false => {
                next += 1;
                char::from_u32(next - 1).expect("Latin Extended-A")
            }
        })
        .collect()
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": false, "model_max_length": 1024,
        "chat_template": "{%- for message in messages %}\n{{- '<|' + message['role'] + '|>' }}\n\
            {%- if message['role'] == 'assistant' %}\n\
            {%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}\n\
            {%- else %}\n{{- message['content'] + '<|end|>' }}\n{%- endif %}\n{%- endfor %}\n\
            {%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    })
}

fn yaml(folder: &Path) -> String {
    let path = |name: &str| Value::from(folder.join(name).to_string_lossy()).to_string();
    let layout = Value::from(format!("oci:{}", folder.join("image").display())).to_string();
    format!(
        "# Everything a run needs. Keys inside training_config are those of transformers, peft and trl.\n\
         model: {}          # a Hugging Face model folder\n\
         data: {}   # URL, file, folder or glob\n\
         output: {}       # the adapter, for peft and vLLM\n\
         push: {}       # or registry.example.com/team/adapter:v1\n\
         name: quickstart\n\
         device: cpu\n\
         training_config:\n\
         \x20 QuantizationConfig:\n\
         \x20   load_in_4bit: true\n\
         \x20   bnb_4bit_quant_type: nf4\n\
         \x20   bnb_4bit_use_double_quant: true\n\
         \x20 LoraConfig:\n\
         \x20   r: 16\n\
         \x20   lora_alpha: 32\n\
         \x20 TrainingArguments:\n\
         \x20   learning_rate: 0.005\n\
         \x20   max_steps: 60\n\
         \x20   per_device_train_batch_size: 16\n\
         \x20   logging_steps: 10\n\
         \x20   save_strategy: \"no\"\n\
         \x20 DatasetConfig:\n\
         \x20   train_test_split: 0.9\n",
        path("model"),
        path("data.parquet"),
        path("adapter"),
        layout
    )
}

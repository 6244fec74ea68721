//! A model's tokenizer.json -> the tokenizer's keys in GGUF: tokens, kinds, merges or scores, special ids, chat
//! template.
//!
//! Two kinds of tokenizers are covered: byte-level BPE ("gpt2" there) with its merges, and SentencePiece's BPE with
//! bytes to fall back on ("llama" there) with scores. Scores follow from the merges: llama.cpp joins the pair with
//! the best score, and SentencePiece's own scores are the merges' order.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use super::dividing;
use super::file::Value;
use crate::fault::{Fault, Result};

/// LIMIT: the largest tokenizer.json in use have about 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// llama.cpp's kinds of tokens.
mod kind {
    /// A token of text.
    pub const NORMAL: i32 = 1;
    /// The token for text that the vocabulary lacks.
    pub const UNKNOWN: i32 = 2;
    /// A special token, which is not printed.
    pub const CONTROL: i32 = 3;
    /// An added token that is printed.
    pub const USER_DEFINED: i32 = 4;
    /// An id without a token.
    pub const UNUSED: i32 = 5;
    /// One byte of text that no other token has.
    pub const BYTE: i32 = 6;
}

/// The statements of the model's other files about its tokenizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OfModel<'a> {
    /// The token that begins a sequence.
    pub bos: Option<u32>,
    /// The token that ends a sequence.
    pub eos: u32,
    /// The padding token.
    pub pad: Option<u32>,
    /// The end of the assistant's turn.
    pub end_of_turn: Option<u32>,
    /// Whether a sequence begins with `bos` by itself.
    pub adds_bos: bool,
    /// Whether a sequence ends with `eos` by itself.
    pub adds_eos: bool,
    /// The template of the training.
    pub chat_template: Option<&'a str>,
}

/// The keys, and the warnings about them.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// Keys and values.
    pub keys: Vec<(String, Value)>,
    /// Differences that llama.cpp may show.
    pub warnings: Vec<String>,
}

/// Reads a folder's tokenizer for an embedding of `rows` rows.
///
/// # Errors
/// Model: a tokenizer of another kind, or more tokens than rows.
pub fn read(folder: &Path, rows: usize, model: &OfModel) -> Result<Vocabulary> {
    let file = folder.join("tokenizer.json");
    let tokenizer = json(&file)?;
    let config = json(&folder.join("tokenizer_config.json"))?;
    let wrong = |what: String| Fault::model(format!("{}: {what}", file.display()));
    let bpe = &tokenizer["model"];
    if bpe["type"].as_str() != Some("BPE") {
        let found = &bpe["type"];
        return Err(wrong(format!("GGUF: found a tokenizer of type {found}, expected BPE"))
            .help("write safetensors, and convert them with llama.cpp's own converter"));
    }
    let pieces = bpe["byte_fallback"].as_bool() == Some(true);
    let unknown = bpe["unk_token"].as_str();
    let (texts, kinds) = tokens(&tokenizer, &config, rows, pieces).map_err(wrong)?;
    let merges = merges(&bpe["merges"]);
    let refused = |what: String| {
        wrong(format!("GGUF: {what}")).help(
            "write safetensors: llama.cpp would read a text as other tokens than this model was trained on",
        )
    };
    let warnings = dividing::normalizer(&tokenizer, pieces).map_err(refused)?.into_iter().collect();
    let mut keys = vec![key("ggml.model", Value::Text(if pieces { "llama" } else { "gpt2" }.into()))];
    match pieces {
        true => {
            dividing::pieces(&tokenizer).map_err(refused)?;
            keys.push(key("ggml.pre", Value::Text("default".into())));
            keys.push(key("ggml.scores", Value::F32s(scores(&texts, &merges))));
            keys.push(key("ggml.add_space_prefix", Value::Bool(prefixed(&tokenizer))));
        }
        false => {
            let pre = dividing::name(&tokenizer).map_err(refused)?;
            keys.push(key("ggml.pre", Value::Text(pre.into())));
            keys.push(key(
                "ggml.merges",
                Value::Texts(merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect()),
            ));
        }
    }
    keys.push(key("ggml.tokens", Value::Texts(texts)));
    keys.push(key("ggml.token_type", Value::I32s(kinds)));
    keys.extend(special(model, unknown.and_then(|text| bpe["vocab"][text].as_u64())));
    Ok(Vocabulary { keys, warnings })
}

/// Returns the text and kind of every row's token. Error: a fault of the file.
fn tokens(
    tokenizer: &Json,
    config: &Json,
    rows: usize,
    pieces: bool,
) -> std::result::Result<(Vec<String>, Vec<i32>), String> {
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
    let mut put = |id: u64, text: &str, kind: i32| match tokens.get_mut(id as usize) {
        Some(place) => {
            *place = Some((text.to_owned(), kind));
            Ok(())
        }
        None => Err(format!("token {text:?} has the id {id}, the embedding has {rows} rows")),
    };
    let bpe = &tokenizer["model"];
    let is_unknown = |text: &str| pieces && bpe["unk_token"].as_str() == Some(text);
    let is_byte = |text: &str| pieces && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
    for (text, id) in bpe["vocab"].as_object().into_iter().flatten() {
        let kind = match text.as_str() {
            text if is_unknown(text) => kind::UNKNOWN,
            text if is_byte(text) => kind::BYTE,
            _ => kind::NORMAL,
        };
        put(id.as_u64().unwrap_or(u64::MAX), text, kind)?;
    }
    for (id, added) in added(tokenizer, config) {
        let text = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"].as_bool() {
            _ if is_unknown(text) => kind::UNKNOWN,
            Some(true) => kind::CONTROL,
            _ => kind::USER_DEFINED,
        };
        put(id, text, kind)?;
    }
    let padded = tokens.into_iter().enumerate();
    Ok(padded.map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), kind::UNUSED))).unzip())
}

fn key(name: &str, value: Value) -> (String, Value) {
    (format!("tokenizer.{name}"), value)
}

fn special(model: &OfModel, unknown: Option<u64>) -> Vec<(String, Value)> {
    let ids = [
        ("ggml.bos_token_id", model.bos),
        ("ggml.eos_token_id", Some(model.eos)),
        ("ggml.eot_token_id", model.end_of_turn.filter(|id| *id != model.eos)),
        ("ggml.unknown_token_id", unknown.and_then(|id| u32::try_from(id).ok())),
        ("ggml.padding_token_id", model.pad),
    ];
    let mut keys: Vec<(String, Value)> =
        ids.into_iter().filter_map(|(name, id)| Some(key(name, Value::U32(id?)))).collect();
    keys.push(key("ggml.add_bos_token", Value::Bool(model.adds_bos)));
    keys.push(key("ggml.add_eos_token", Value::Bool(model.adds_eos)));
    keys.extend(model.chat_template.map(|text| key("chat_template", Value::Text(text.into()))));
    keys
}

/// Returns tokens beside the vocabulary, those of tokenizer_config.json last, as transformers adds them.
fn added<'a>(tokenizer: &'a Json, config: &'a Json) -> Vec<(u64, &'a Json)> {
    let own = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let own = own.filter_map(|token| Some((token["id"].as_u64()?, token)));
    let declared = config["added_tokens_decoder"].as_object().into_iter().flatten();
    own.chain(declared.filter_map(|(id, token)| Some((id.parse().ok()?, token)))).collect()
}

/// Returns the merges. The file writes a pair as `a b` or as a list.
fn merges(merges: &Json) -> Vec<(String, String)> {
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        list => Some((list[0].as_str()?.to_owned(), list[1].as_str()?.to_owned())),
    };
    merges.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// Minus the number of the first merge that makes a token; tokens that none makes come after all.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut first: HashMap<String, usize> = HashMap::new();
    for (number, (a, b)) in merges.iter().enumerate() {
        first.entry(format!("{a}{b}")).or_insert(number);
    }
    let score = |token: &String| -(first.get(token).copied().unwrap_or(merges.len()) as f32);
    tokens.iter().map(score).collect()
}

/// Returns whether a text gets a blank in front of it.
fn prefixed(tokenizer: &Json) -> bool {
    let has = |part: &Json| {
        part["type"] == "Prepend" || (part["type"] == "Metaspace" && part["prepend_scheme"] != "never")
    };
    [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")].iter().any(|(one, many)| {
        let part = &tokenizer[*one];
        has(part) || part[*many].as_array().into_iter().flatten().any(has)
    })
}

/// Returns `Null` if there is no such file.
fn json(file: &Path) -> Result<Json> {
    let bytes = match std::fs::metadata(file) {
        Ok(data) if data.len() <= FILE_BYTES_MAX => {
            std::fs::read(file).map_err(|error| Fault::storage("read", file, &error))?
        }
        Ok(_) => return Err(Fault::model(format!("{}: too large", file.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Json::Null),
        Err(error) => return Err(Fault::storage("read", file, &error)),
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| Fault::model(format!("{}: not JSON: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    fn folder(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
    }

    fn value<'a>(vocabulary: &'a Vocabulary, name: &str) -> &'a Value {
        let name = format!("tokenizer.{name}");
        &vocabulary.keys.iter().find(|(key, _)| *key == name).unwrap_or_else(|| panic!("{name}")).1
    }

    #[test]
    fn both_kinds_of_tokenizers_are_read() {
        let model = OfModel { bos: Some(1018), eos: 1023, ..OfModel::default() };
        let llama = read(&folder("llama3"), 1024, &model).unwrap();
        assert_eq!(value(&llama, "ggml.model"), &Value::Text("gpt2".into()));
        let Value::Texts(tokens) = value(&llama, "ggml.tokens") else { panic!() };
        let Value::I32s(kinds) = value(&llama, "ggml.token_type") else { panic!() };
        let Value::Texts(merges) = value(&llama, "ggml.merges") else { panic!() };
        assert_eq!((tokens.len(), kinds.len(), merges.len()), (1024, 1024, 762));
        assert_eq!(kinds[1018], kind::CONTROL);
        let phi = read(&folder("phi3"), 1024, &OfModel::default()).unwrap();
        assert_eq!(value(&phi, "ggml.model"), &Value::Text("llama".into()));
        assert_eq!(value(&phi, "ggml.add_space_prefix"), &Value::Bool(true));
        let Value::F32s(scores) = value(&phi, "ggml.scores") else { panic!() };
        assert!(scores.contains(&0.0) && scores.len() == 1024);
        let gemma = read(&folder("gemma2"), 512, &OfModel::default()).unwrap();
        assert_eq!(value(&gemma, "ggml.add_space_prefix"), &Value::Bool(false));
        let fault = read(&folder("llama3"), 100, &model).unwrap_err();
        assert!(fault.message.contains("the embedding has 100 rows"), "{fault}");
    }

    #[test]
    fn scores_follow_the_merges() {
        let merge = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let merges = [merge("a", "b"), merge("ab", "c"), merge("a", "bc")];
        let tokens = ["ab", "abc", "a"].map(str::to_owned);
        assert_eq!(scores(&tokens, &merges), [0.0, -1.0, -3.0]);
    }
}

//! Keys -> the storage and precision of the base, and the adapted modules.

use super::reader::Reader;
use crate::facts::{
    FourBitCode, Keep, LoraInit, LoraOptions, Matching, Modules, Precision, Quantization, RANK_MAX,
    Residency, Targets, Tokens,
};
use crate::memory;
use crate::spec::Origin;
use crate::spec::keys::Section;
use crate::spec::value::Value as Written;

pub(super) fn quantization(reader: &mut Reader) -> Quantization {
    use Section::QuantizationConfig as Q;
    let four = reader.boolean(Q, "load_in_4bit");
    let eight = reader.boolean(Q, "load_in_8bit");
    let code = match reader.text(Q, "bnb_4bit_quant_type").as_deref() {
        Some("nf4") => FourBitCode::Nf4,
        _ => FourBitCode::Fp4,
    };
    let double = reader.boolean(Q, "bnb_4bit_use_double_quant");
    if eight {
        let origin = reader.origin(Q, "load_in_8bit");
        let message = if four {
            "QuantizationConfig: load_in_4bit and load_in_8bit are both true; choose load_in_4bit"
        } else {
            "QuantizationConfig.load_in_8bit: there is no 8-bit base; use load_in_4bit: true, or neither for plain LoRA"
        };
        reader.wrong(&origin, message);
    }
    if four {
        return Quantization::FourBit { code, double };
    }
    for name in ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"] {
        if let Some(given) = reader.given(Q, name) {
            let message = format!(
                "{}: QuantizationConfig.{name} does nothing without load_in_4bit: true",
                given.origin
            );
            reader.warn(message);
        }
    }
    Quantization::None
}

/// Returns the precision: `compute`, or else a 4-bit base's compute type, or else `bf16`/`fp16`, or else the model's
/// type, or else bf16.
pub(super) fn precision(reader: &mut Reader, quantization: Quantization) -> Precision {
    use Section::{ModelConfig as M, QuantizationConfig as Q, TrainingArguments as T};
    let compute = reader.text(Q, "bnb_4bit_compute_dtype").filter(|_| quantization != Quantization::None);
    let dtype = reader.text(M, "torch_dtype");
    let bf16 = reader.maybe_boolean(T, "bf16");
    let fp16 = reader.boolean(T, "fp16");
    if fp16 && bf16 == Some(true) {
        let origin = reader.origin(T, "fp16");
        reader.wrong(&origin, "TrainingArguments: bf16 and fp16 are both true; choose one");
    }
    let from = |reader: &Reader, section, name, word: &str| (word.to_string(), reader.origin(section, name));
    let (word, origin) = match (compute, dtype) {
        (Some(word), _) => from(reader, Q, "bnb_4bit_compute_dtype", &word),
        _ if bf16 == Some(true) => from(reader, T, "bf16", "bfloat16"),
        _ if fp16 => from(reader, T, "fp16", "float16"),
        (_, Some(word)) => from(reader, M, "torch_dtype", &word),
        _ if bf16 == Some(false) => from(reader, T, "bf16", "float32"),
        _ => ("bfloat16".into(), Origin::Default),
    };
    let (word, origin) = match reader.text(Section::Hone, "compute") {
        None => (word, origin),
        Some(chosen) => {
            let own = reader.origin(Section::Hone, "compute");
            let beside = if chosen == "fp8" { "bfloat16" } else { &chosen };
            if origin != Origin::Default && word != beside {
                reader.warn(format!("{own}: compute: {chosen} overrides {word}, which {origin} asks for"));
            }
            (chosen, own)
        }
    };
    if word == "float16" {
        reader.warn(format!(
            "{origin}: float16 runs as bfloat16, which has the same size and needs no loss scaling"
        ));
    }
    let precision = match word.as_str() {
        "float32" => Precision::F32,
        "fp8" => Precision::Fp8,
        _ => Precision::Bf16,
    };
    reader.derive("precision", precision.name(), origin);
    precision
}

pub(super) fn memory(reader: &mut Reader) -> memory::Options {
    let limit = reader.text(Section::Hone, "memory_max");
    if let Some(text) = limit.as_deref().filter(|text| memory::Limit::parse(text).is_none()) {
        let origin = reader.origin(Section::Hone, "memory_max");
        reader.wrong(
            &origin,
            format!("memory_max: expected 20GiB, bytes or a share from 0 to 1, found {text:?}"),
        );
    }
    memory::Options {
        keep: keep(reader),
        limit: limit.as_deref().and_then(memory::Limit::parse),
        tokens_max: reader.maybe_integer(Section::Hone, "pass_tokens_max").map(|tokens| tokens as usize),
        residency: reader.text(Section::Hone, "residency").as_deref().and_then(Residency::named),
    }
}

/// Returns the amount that layers keep: `keep`, or else `gradient_checkpointing`. `None`: as much as memory allows.
fn keep(reader: &mut Reader) -> Option<Keep> {
    let level = reader.text(Section::Hone, "keep").as_deref().and_then(Keep::named);
    let older = reader.maybe_boolean(Section::TrainingArguments, "gradient_checkpointing");
    let older = older.map(|given| if given { Keep::LayerInputs } else { Keep::Everything });
    let origin = match (level, older) {
        (None, Some(_)) => reader.origin(Section::TrainingArguments, "gradient_checkpointing"),
        _ => reader.origin(Section::Hone, "keep"),
    };
    let keep = level.or(older);
    reader.derive("kept for the backward pass", keep.map_or("auto", Keep::name), origin);
    keep
}

pub(super) fn lora(reader: &mut Reader, seed: u64) -> LoraOptions {
    use Section::LoraConfig as L;
    let layers: Vec<usize> =
        reader.integers(L, "layers_to_transform").into_iter().map(|layer| layer as usize).collect();
    let layers_pattern = reader.texts(L, "layers_pattern");
    if layers.is_empty() && !layers_pattern.is_empty() {
        let origin = reader.origin(L, "layers_pattern");
        reader
            .wrong(&origin, "LoraConfig.layers_pattern: it names the list of layers that layers_to_transform counts in; give both");
    }
    let matching = match reader.text(Section::Hone, "target_matching").as_deref() {
        Some("literal") => Matching::Literal,
        _ => Matching::Fused,
    };
    let rank_pattern = rank_pattern(reader);
    let alpha = reader.number(L, "lora_alpha");
    let alpha_pattern = reader.map(L, "alpha_pattern");
    if alpha == 0.0 {
        let origin = reader.origin(L, "lora_alpha");
        reader.wrong(
            &origin,
            "LoraConfig.lora_alpha: 0 scales the adapter to nothing, so that nothing would be learned; usual values are r and 2 * r",
        );
    }
    if let Some((pattern, _)) = alpha_pattern.iter().find(|(_, alpha)| *alpha == 0.0) {
        let origin = reader.origin(L, "alpha_pattern");
        reader.wrong(
            &origin,
            format!("LoraConfig.alpha_pattern: {pattern}: 0 scales these modules to nothing"),
        );
    }
    let (init, r) = (init(reader), rank(reader));
    let odd =
        std::iter::once(&r).chain(rank_pattern.iter().map(|(_, rank)| rank)).find(|rank| *rank % 2 == 1);
    if let (LoraInit::Orthogonal, Some(odd)) = (init, odd) {
        let origin = reader.origin(L, "init_lora_weights");
        reader.wrong(
            &origin,
            format!("LoraConfig.init_lora_weights: orthogonal: needs even ranks, found {odd}"),
        );
    }
    LoraOptions {
        r,
        alpha,
        dropout: reader.number(L, "lora_dropout"),
        rslora: reader.boolean(L, "use_rslora"),
        dora: reader.boolean(L, "use_dora"),
        targets: targets(reader),
        matching,
        exclude: exclude(reader),
        layers,
        layers_pattern,
        rank_pattern,
        alpha_pattern,
        tokens: tokens(reader),
        init,
        seed,
    }
}

/// Reads PEFT's two forms: a list of tokens, whose rows of the embedding are trained, or a map from tables to lists.
fn tokens(reader: &mut Reader) -> Tokens {
    use Section::LoraConfig as L;
    const KEY: &str = "trainable_token_indices";
    let mut tokens = Tokens::default();
    let tables = match reader.any(L, KEY) {
        None | Some(Written::Null) => return tokens,
        Some(Written::Map(tables)) => tables,
        Some(list) => vec![("embed_tokens".to_owned(), list)],
    };
    for (table, list) in tables {
        let ids = match &list {
            Written::List(items) => items.iter().map(token).collect::<Option<Vec<u32>>>(),
            one => token(one).map(|id| vec![id]),
        };
        let Some(ids) = ids else {
            let origin = reader.origin(L, KEY);
            reader.wrong(
                &origin,
                format!(
                    "LoraConfig.{KEY}: expected numbers of tokens, such as [128002, 128003] or {{embed_tokens: [128002], \
                     lm_head: [128002]}}, found {}",
                    list.to_json()
                ),
            );
            return Tokens::default();
        };
        match table.rsplit('.').next() {
            Some("lm_head") => tokens.head = ids,
            Some("embed_tokens" | "word_embeddings") => tokens.embedding = ids,
            _ => {
                let origin = reader.origin(L, KEY);
                reader.wrong(
                    &origin,
                    format!("LoraConfig.{KEY}: {table}: expected embed_tokens (the embedding) or lm_head (the output head)"),
                );
            }
        }
    }
    tokens
}

fn token(value: &Written) -> Option<u32> {
    match value {
        // Scalars of a value of any shape stay as they are written.
        Written::Text(text) => text.trim().parse().ok(),
        Written::Integer(id) => u32::try_from(*id).ok(),
        Written::Number(id) if id.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(id) => {
            Some(*id as u32)
        }
        _ => None,
    }
}

fn rank(reader: &mut Reader) -> usize {
    let rank = reader.integer(Section::LoraConfig, "r") as usize;
    if rank > RANK_MAX {
        let origin = reader.origin(Section::LoraConfig, "r");
        reader.wrong(&origin, format!("LoraConfig.r: expected at most {RANK_MAX}, found {rank}"));
    }
    rank
}

fn rank_pattern(reader: &mut Reader) -> Vec<(String, usize)> {
    let pattern = reader.map(Section::LoraConfig, "rank_pattern");
    let is_rank = |rank: f64| rank.fract() == 0.0 && (1.0..=RANK_MAX as f64).contains(&rank);
    if let Some((name, rank)) = pattern.iter().find(|(_, rank)| !is_rank(*rank)) {
        let origin = reader.origin(Section::LoraConfig, "rank_pattern");
        reader.wrong(
            &origin,
            format!(
                "LoraConfig.rank_pattern: {name}: expected a whole number from 1 to {RANK_MAX}, found {rank}"
            ),
        );
    }
    pattern.into_iter().map(|(name, rank)| (name, rank as usize)).collect()
}

/// Ways of PEFT to begin that are not here, and why.
const OTHER_BEGINNINGS: [(&[&str], &str); 4] = [
    (
        &["pissa", "pissa_niter", "olora"],
        "it changes the base, so that the adapter would fit no other copy of it, or would need twice the rank; use orthogonal, \
         which also learns in A and B from the first step, or true or gaussian",
    ),
    (
        &["eva", "corda", "lora_ga"],
        "it needs a pass over the data before training; use true, gaussian or orthogonal",
    ),
    (&["loftq"], "it needs the unquantised base beside the quantised one; use true, gaussian or orthogonal"),
    (&["false"], "it begins with a B that is not zero, for tests of PEFT; use true, gaussian or orthogonal"),
];

fn init(reader: &mut Reader) -> LoraInit {
    use Section::LoraConfig as L;
    let word = reader.text(L, "init_lora_weights").unwrap_or_default().to_lowercase();
    let why = OTHER_BEGINNINGS.iter().find(|(words, _)| words.iter().any(|other| word.starts_with(other)));
    match (word.as_str(), why) {
        ("gaussian", _) => LoraInit::Gaussian,
        ("orthogonal", _) => LoraInit::Orthogonal,
        ("true", _) => LoraInit::Kaiming,
        (_, why) => {
            let origin = reader.origin(L, "init_lora_weights");
            let why = why.map_or("expected true, gaussian or orthogonal", |(_, why)| *why);
            reader.wrong(&origin, format!("LoraConfig.init_lora_weights: {word}: {why}"));
            LoraInit::Kaiming
        }
    }
}

/// Returns the modules to adapt. A list holds names. A single string is `all-linear`, a name (KAITO makes a list of
/// it), or else PEFT's regular expression on the whole path, which a bare name could never match.
fn targets(reader: &mut Reader) -> Targets {
    use Section::LoraConfig as L;
    let origin = reader.origin(L, "target_modules");
    match modules(reader, "target_modules") {
        Modules::Names(names) if names.is_empty() => {
            let message = "LoraConfig.target_modules: an empty list; name modules, or remove the key for all linear layers";
            reader.wrong(&origin, message);
            Targets::AllLinear
        }
        Modules::Names(names) if matches!(names.as_slice(), [only] if only.eq_ignore_ascii_case("all-linear")) => {
            Targets::AllLinear
        }
        modules => Targets::Modules(modules),
    }
}

fn exclude(reader: &mut Reader) -> Modules {
    modules(reader, "exclude_modules")
}

/// Returns the modules of a key: names, or a single string that is not a name and therefore a regular expression.
fn modules(reader: &mut Reader, key: &str) -> Modules {
    use Section::LoraConfig as L;
    let origin = reader.origin(L, key);
    let one = reader.given(L, key).is_none_or(|given| matches!(given.value, Written::Text(_)));
    let names = reader.texts(L, key);
    match names.as_slice() {
        [only] if one && !Modules::is_name(only) => {
            if only.split(',').count() > 1 && only.split(',').all(|part| Modules::is_name(part.trim())) {
                let list = only.split(',').map(str::trim).collect::<Vec<_>>().join(", ");
                let message = format!("LoraConfig.{key}: one string with commas; write a list: [{list}]");
                reader.wrong(&origin, message);
            }
            Modules::Pattern(only.clone())
        }
        _ => Modules::Names(names),
    }
}

//! A checkpoint that bitsandbytes has quantised -> its 4-bit weights as they are stored, bit for bit.
//!
//! Next to `x.weight` (the codes) the checkpoint has `x.weight.absmax`, `.quant_map`, with double quantisation
//! `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, which is JSON in bytes. Source:
//! bitsandbytes 0.50, `functional.QuantState`; transformers writes `quantization_config` into config.json.
//!
//! The state's `dtype`, the type of the weight before, is not used here: bitsandbytes' forward pass dequantises to
//! the type of the activations. Its backward pass first rounds to `dtype`, which is not the gradient of that
//! forward pass. hone uses the same values in both (in recorded runs no step's loss differs by more than 1e-5).

use candle_core::{Device, Tensor};
use safetensors::Dtype;
use serde::Deserialize;

use crate::facts::quantization::Code;
use crate::fault::{Fault, Result};
use crate::ops::four_bit::{self, Absmax, Expanded, FourBit};

use super::weights::{Checkpoint, Raw};

const STATE: &str = "quant_state.bitsandbytes__";

/// Returns whether a tensor's name is that of a companion of a stored weight.
pub fn is_part(name: &str) -> bool {
    let Some((_, part)) = name.rsplit_once(".weight.") else { return false };
    ["absmax", "quant_map", "nested_absmax", "nested_quant_map"].contains(&part) || part.starts_with(STATE)
}

/// Returns whether a weight is stored in 4 bits; `llm_int8_skip_modules` are not.
pub fn has(checkpoint: &Checkpoint, name: &str) -> bool {
    state(checkpoint, name).is_some()
}

fn state<'a>(checkpoint: &'a Checkpoint, name: &str) -> Option<(Code, Raw<'a>)> {
    [Code::Nf4, Code::Fp4].into_iter().find_map(|code| {
        let raw = checkpoint.raw(&format!("{name}.{STATE}{}", code.name()))?;
        Some((code, raw))
    })
}

/// The part of `QuantState` that is not tensors.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

/// Returns the weight [rows, cols] called `name`, which is stored in 4 bits (`has`). A state that contradicts the facts
/// is a model fault.
pub fn weight(checkpoint: &Checkpoint, name: &str, rows: usize, cols: usize) -> Result<FourBit> {
    let wrong = |what: String| Fault::model(format!("{name}: {what}")).help("download the checkpoint again");
    let (code, raw) =
        state(checkpoint, name).ok_or_else(|| wrong("its quantisation state is missing".into()))?;
    let state: State = serde_json::from_slice(raw.bytes)
        .map_err(|error| wrong(format!("its quantisation state cannot be read: {error}")))?;
    if state.shape != [rows, cols] || state.quant_type != code.name() {
        let (kind, shape) = (&state.quant_type, &state.shape);
        return Err(wrong(format!(
            "found {kind} of shape {shape:?}, expected {} {:?}",
            code.name(),
            [rows, cols]
        )));
    }
    if !state.blocksize.is_power_of_two() || !(32..=4096).contains(&state.blocksize) {
        return Err(wrong(format!(
            "found blocks of {}, expected a power of two from 32 to 4096",
            state.blocksize
        )));
    }
    let parts = Parts { checkpoint, name };
    parts.same_map("quant_map", code.values())?;
    let count = rows * cols;
    let blocks = count.div_ceil(state.blocksize);
    // The codes may be stored as any type (`bnb_4bit_quant_storage`).
    let packed = parts.find("")?.bytes;
    if packed.len() != count.div_ceil(2) {
        return Err(wrong(format!("found {} bytes of codes, expected {}", packed.len(), count.div_ceil(2))));
    }
    let absmax = match state.nested_offset {
        None => Absmax::Plain(Tensor::from_vec(parts.floats("absmax", blocks)?, blocks, &Device::Cpu)?),
        Some(offset) => parts.nested(blocks, &state, offset as f32)?,
    };
    let packed = Tensor::from_slice(packed, packed.len(), &Device::Cpu)?;
    let (block, expanded) = (state.blocksize, Expanded::default());
    Ok(FourBit { code, rows, cols, block, packed, absmax, expanded })
}

/// The tensors that belong to one weight.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
}

impl<'a> Parts<'a> {
    fn find(&self, part: &str) -> Result<Raw<'a>> {
        let name = if part.is_empty() { self.name.to_owned() } else { format!("{}.{part}", self.name) };
        self.checkpoint.raw(&name).ok_or_else(|| self.wrong(part, "it is missing"))
    }

    fn wrong(&self, part: &str, what: &str) -> Fault {
        Fault::model(format!("{}.{part}: {what}", self.name)).help("download the checkpoint again")
    }

    fn floats(&self, part: &str, length: usize) -> Result<Vec<f32>> {
        let values = self.checkpoint.get(&format!("{}.{part}", self.name), &[length])?.to_f32();
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(self.wrong(part, "it holds values that are not finite")),
        }
    }

    /// Refuses codes whose meaning differs from hone's own table. bitsandbytes itself compares maps to 1e-6.
    fn same_map(&self, part: &str, expected: &[f32]) -> Result<()> {
        let found = self.floats(part, expected.len())?;
        match found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= 1e-6) {
            true => Ok(()),
            false => Err(self.wrong(part, "its values are not those of bitsandbytes' map")),
        }
    }

    fn nested(&self, blocks: usize, state: &State, offset: f32) -> Result<Absmax> {
        if state.nested_blocksize != Some(four_bit::NESTED_BLOCK) {
            let found = state.nested_blocksize.map_or("none".into(), |block| block.to_string());
            return Err(self.wrong("absmax", &format!("found blocks of {found} scales, expected 256")));
        }
        self.same_map("nested_quant_map", four_bit::dynamic_map())?;
        let codes = self.find("absmax")?;
        if codes.dtype != Dtype::U8 || codes.shape != [blocks] {
            let found = format!("found {:?} {:?}, expected U8 {:?}", codes.dtype, codes.shape, [blocks]);
            return Err(self.wrong("absmax", &found));
        }
        let nested = blocks.div_ceil(four_bit::NESTED_BLOCK);
        Ok(Absmax::Nested {
            codes: Tensor::from_slice(codes.bytes, blocks, &Device::Cpu)?,
            absmax: Tensor::from_vec(self.floats("nested_absmax", nested)?, nested, &Device::Cpu)?,
            offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn golden(case: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case).join("model")
    }

    #[test]
    fn a_stored_weight_is_taken_as_it_is() {
        let checkpoint = Checkpoint::open(&golden("llama_stored_nf4")).unwrap();
        let name = "model.layers.0.mlp.down_proj.weight";
        let weight = weight(&checkpoint, name, 64, 64).unwrap();
        assert_eq!((weight.code, weight.block), (Code::Nf4, 64));
        assert_eq!(weight.packed.to_vec1::<u8>().unwrap(), checkpoint.raw(name).unwrap().bytes);
        // Quantising its values again finds the same codes.
        let values = weight.dequantize().unwrap();
        let again = FourBit::quantize(&values, 64, 64, Code::Nf4, true).unwrap();
        assert_eq!(again.packed.to_vec1::<u8>().unwrap(), weight.packed.to_vec1::<u8>().unwrap());
        assert!(has(&checkpoint, name) && !has(&checkpoint, "model.embed_tokens.weight"));
        let fault = super::weight(&checkpoint, name, 64, 128).unwrap_err();
        assert!(fault.message.contains("found nf4 of shape [64, 64]"), "{fault}");
    }
}

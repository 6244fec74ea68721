//! A base and adapters -> files that other programs load: a model folder of safetensors, or GGUF.
//!
//! Weights go through a piece at a time, so that a model of any size needs little memory. Files appear under their
//! final name when all of them are whole.

pub mod folder;
pub mod merged;
pub mod model_folder;
pub mod gguf;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::fault::{Fault, Result};

/// Type of the weights in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// Blocks of 32 with a scale each; GGUF only.
    Q8,
}

/// Values of one block of `Stored::Q8`.
pub const Q8_BLOCK: usize = 32;
/// Bytes of one: an f16 scale, and a signed byte for each value.
pub const Q8_BYTES: usize = 34;

impl Stored {
    const NAMES: [(&'static str, Stored); 4] =
        [("bf16", Stored::Bf16), ("f16", Stored::F16), ("f32", Stored::F32), ("q8_0", Stored::Q8)];

    /// Returns the type of this name.
    pub fn named(name: &str) -> Option<Stored> {
        Stored::NAMES.iter().find(|(other, _)| *other == name).map(|(_, stored)| *stored)
    }

    /// Returns the name in flags and file names.
    pub fn name(self) -> &'static str {
        Stored::NAMES
            .iter()
            .find(|(_, stored)| *stored == self)
            .map(|(name, _)| *name)
            .expect("all are named")
    }

    /// Returns the number of bytes of so many values; of `Q8` a multiple of its block.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Stored::F32 => 4 * values,
            Stored::F16 | Stored::Bf16 => 2 * values,
            Stored::Q8 => values / Q8_BLOCK * Q8_BYTES,
        }
    }

    /// Returns the values as bytes, each rounded to the nearest; `name` is for messages.
    ///
    /// # Errors
    /// Model: a value that the type cannot hold.
    pub fn encode(self, name: &str, values: &[f32]) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; self.bytes(values.len())];
        match self {
            Stored::F32 => fill(&mut bytes, values, 1, |out, v| out.copy_from_slice(&v[0].to_le_bytes())),
            Stored::Bf16 => {
                fill(&mut bytes, values, 1, |out, v| {
                    out.copy_from_slice(&bf16::from_f32(v[0]).to_le_bytes())
                });
            }
            Stored::F16 => {
                let largest = values.par_iter().map(|value| value.abs()).reduce(|| 0.0, f32::max);
                if f16::from_f32(largest).is_infinite() {
                    return Err(Fault::model(format!("{name}: a value of {largest} is beyond f16's 65504"))
                        .help("write another type: --type bf16"));
                }
                fill(&mut bytes, values, 1, |out, v| out.copy_from_slice(&f16::from_f32(v[0]).to_le_bytes()));
            }
            Stored::Q8 => fill(&mut bytes, values, Q8_BLOCK, q8_block),
        }
        Ok(bytes)
    }

    /// Returns the other way.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Stored::F32 => bytes.as_chunks().0.par_iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Stored::F16 => bytes.as_chunks().0.par_iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Stored::Bf16 => {
                bytes.as_chunks().0.par_iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
            }
            Stored::Q8 => bytes
                .as_chunks::<Q8_BYTES>()
                .0
                .par_iter()
                .flat_map_iter(|block| {
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    block[2..].iter().map(move |&code| scale * f32::from(code.cast_signed()))
                })
                .collect(),
        }
    }
}

fn fill(bytes: &mut [u8], values: &[f32], block: usize, write: impl Fn(&mut [u8], &[f32]) + Sync) {
    let size = bytes.len() / (values.len() / block).max(1);
    bytes.par_chunks_mut(size.max(1)).zip(values.par_chunks(block)).for_each(|(out, v)| write(out, v));
}

/// Writes a block as ggml's `quantize_row_q8_0_ref` does: the largest magnitude becomes 127, halves are rounded away
/// from zero.
fn q8_block(out: &mut [u8], values: &[f32]) {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (code, value) in out[2..].iter_mut().zip(values) {
        *code = ((value * inverse).round() as i8).cast_unsigned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_reads_what_it_wrote_within_its_rounding() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) * 0.37).collect();
        let largest = 31.5f32 * 0.37;
        for (stored, bound) in
            // Half a unit in the last place of 8 to 16; for Q8 half a step, and the rounding of the scale to f16.
            [
                (Stored::F32, 0.0),
                (Stored::F16, 0.00390625),
                (Stored::Bf16, 0.03125),
                (Stored::Q8, largest * (1.0 / 254.0 + 1.0 / 2048.0)),
            ]
        {
            let bytes = stored.encode("x", &values).unwrap();
            assert_eq!(bytes.len(), stored.bytes(values.len()), "{stored:?}");
            let back = stored.decode(&bytes);
            let worst = back.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= bound && (worst > 0.0) == (bound > 0.0), "{stored:?}: {worst}");
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_refused() {
        let fault = Stored::F16.encode("w", &[1.0, 7e4]).unwrap_err();
        assert!(fault.message.contains("w: a value of 70000"), "{fault}");
        assert!(Stored::Bf16.encode("w", &[7e4]).is_ok());
    }
}

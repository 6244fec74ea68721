//! A checkpoint of random weights for any facts. The quickstart trains on it; tests and benchmarks use it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensorError, View};

use crate::fault::{Fault, Result};
use crate::ops::dropout::mix;
use crate::ops::four_bit::{self, Absmax, FourBit};

use crate::facts::{Facts, NormForm, Role, Stored, quantization::Code};

/// Writes `model.safetensors` in bf16. Matrices are normal with standard deviation 1/sqrt(K), embeddings with 0.5,
/// norm factors near 1 and biases near 0. The same facts and seed give the same bytes.
pub fn write(folder: &Path, facts: &Facts, seed: u64) -> Result<()> {
    let mut random = Normal { random: ChaCha8Rng::seed_from_u64(seed) };
    let mut tensors = BTreeMap::new();
    for Stored { name, shape, role } in facts.tensors() {
        let norm = if facts.norm.form == NormForm::RmsPlusOne { 0.0 } else { 1.0 };
        let (mean, deviation) = match role {
            Role::Embedding => (0.0, 0.5),
            Role::Matrix => (0.0, (shape[1] as f32).sqrt().recip()),
            Role::NormWeight => (norm, 0.1),
            Role::Bias => (0.0, 0.1),
        };
        let values = (0..shape.iter().product()).map(|_| mean + deviation * random.draw());
        let bytes = values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        tensors.insert(name, Bytes { shape, bytes });
    }
    let file = folder.join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &file).map_err(|error| {
        let error = match error {
            SafeTensorError::IoError(error) => error,
            other => std::io::Error::other(other.to_string()),
        };
        Fault::storage("write", &file, &error)
    })
}

/// Returns a matrix [rows, cols] in bf16, uniform with standard deviation 1/sqrt(cols), made as fast as memory allows.
pub(super) fn matrix(rows: usize, cols: usize) -> Result<Tensor> {
    let bound = (3.0 / cols as f32).sqrt();
    let mut values = vec![bf16::ZERO; rows * cols];
    values.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
        for (i, value) in values.iter_mut().enumerate() {
            let unit = mix((run * RUN + i) as u64) as u32 as f32 / 2_147_483_648.0 - 1.0;
            *value = bf16::from_f32(bound * unit);
        }
    });
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}

/// Returns a quantised weight [rows, cols] with random codes; its scales repeat those of a small weight that was
/// quantised. The values themselves are never made, so a model of any size needs only the memory of its 4-bit form.
pub(super) fn four_bit(rows: usize, cols: usize, code: Code, double: bool) -> Result<FourBit> {
    const SCALES: usize = 256; // scales that share one second-level scale
    let deviation = 0.7 / (cols as f32).sqrt();
    let small: Vec<f32> = (0..SCALES * four_bit::BLOCK)
        .map(|i| deviation * 3.46 * (mix(i as u64) as u32 as f32 / 4_294_967_296.0 - 0.5))
        .collect();
    let small = FourBit::quantize(&small, SCALES, four_bit::BLOCK, code, double)?;
    let blocks = (rows * cols).div_ceil(four_bit::BLOCK);
    let tiled = |tensor: &Tensor, length: usize| -> Result<Tensor> {
        let times = length.div_ceil(tensor.elem_count());
        Ok(tensor.repeat(times)?.narrow(0, 0, length)?.force_contiguous()?)
    };
    let absmax = match &small.absmax {
        Absmax::Plain(absmax) => Absmax::Plain(tiled(absmax, blocks)?),
        Absmax::Nested { codes, absmax, offset } => Absmax::Nested {
            codes: tiled(codes, blocks)?,
            absmax: tiled(absmax, blocks.div_ceil(SCALES))?,
            offset: *offset,
        },
    };
    let mut packed = vec![0u8; (rows * cols).div_ceil(2)];
    packed.par_chunks_mut(RUN).enumerate().for_each(|(run, bytes)| {
        for (i, bytes) in bytes.chunks_mut(8).enumerate() {
            bytes.copy_from_slice(&mix((run * RUN + i) as u64).to_le_bytes()[..bytes.len()]);
        }
    });
    let packed = Tensor::from_vec(packed, (rows * cols).div_ceil(2), &Device::Cpu)?;
    Ok(FourBit { rows, cols, packed, absmax, ..small })
}

/// Values per task.
const RUN: usize = 1 << 16;

struct Normal {
    random: ChaCha8Rng,
}

impl Normal {
    /// Draws by Box-Muller; the second value of the pair is not used.
    fn draw(&mut self) -> f32 {
        let mut unit = || (self.random.next_u32() as f32 + 0.5) / 4_294_967_296.0;
        let radius = (-2.0 * unit().ln()).sqrt();
        radius * (std::f32::consts::TAU * unit()).cos()
    }
}

struct Bytes {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Odd sizes; values have the size that layers expect.
    #[test]
    fn drawn_weights_have_the_form_of_quantised_ones() {
        for (rows, cols) in [(5, 33), (128, 300)] {
            for double in [false, true] {
                let drawn = four_bit(rows, cols, Code::Nf4, double).unwrap();
                let zeros = vec![0.0; rows * cols];
                let real = FourBit::quantize(&zeros, rows, cols, Code::Nf4, double).unwrap();
                assert_eq!(drawn.bytes(), real.bytes());
                let values = drawn.dequantize().unwrap();
                let squares = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
                assert!((0.2..3.0).contains(&(squares * cols as f32)), "{squares}");
            }
            let drawn = matrix(rows, cols).unwrap().to_dtype(candle_core::DType::F32).unwrap();
            let squares = drawn.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!((squares * cols as f32 - 1.0).abs() < 0.2, "{squares}");
        }
    }
}

//! A checkpoint of random weights for any facts: what the quickstart trains on, what tests and benches measure.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use safetensors::{Dtype, View};

use crate::fault::{Fault, Result};

use super::facts::{Facts, NormForm, Role, Stored};

/// Writes `model.safetensors` in bf16: matrices normal with deviation 1/sqrt(K), embeddings with 0.5, norms'
/// factors and biases near 1 and 0. Same facts and seed, same bytes.
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
    safetensors::serialize_to_file(tensors, None, &file)
        .map_err(|error| Fault::storage("write", &file, &std::io::Error::other(error.to_string())))
}

struct Normal {
    random: ChaCha8Rng,
}

impl Normal {
    /// Box-Muller; one of the pair is enough here.
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

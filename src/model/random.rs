//! A checkpoint of random weights for any facts: what the quickstart trains on, what tests and benches measure.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use safetensors::{Dtype, View};

use crate::fault::{Fault, Result};

use super::facts::Facts;

/// Writes `model.safetensors` in bf16: matrices normal with deviation 1/sqrt(K), embeddings with 0.5, norms and
/// biases near 1 and 0. Same facts and seed, same bytes.
pub fn write(folder: &Path, facts: &Facts, seed: u64) -> Result<()> {
    let mut random = Normal { random: ChaCha8Rng::seed_from_u64(seed) };
    let mut tensors = BTreeMap::new();
    let mut put = |name: String, shape: Vec<usize>, mean: f32, deviation: f32| {
        let values = (0..shape.iter().product()).map(|_| mean + deviation * random.draw());
        let bytes = values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        tensors.insert(name, Stored { shape, bytes });
    };
    let names = &facts.names;
    put(names.embedding.into(), vec![facts.vocab, facts.width], 0.0, 0.5);
    for layer in 0..facts.layers {
        for norm in [names.attention_norm, names.feed_forward_norm] {
            put(format!("{}.{layer}.{norm}", names.layers), vec![facts.width], 1.0, 0.1);
        }
        for projection in facts.projections() {
            let path = facts.path(layer, projection);
            let deviation = (projection.cols as f32).sqrt().recip();
            put(format!("{path}.weight"), vec![projection.rows, projection.cols], 0.0, deviation);
            if projection.bias {
                put(format!("{path}.bias"), vec![projection.rows], 0.0, 0.1);
            }
        }
    }
    put(names.final_norm.into(), vec![facts.width], 1.0, 0.1);
    if !facts.tied_head {
        let deviation = (facts.width as f32).sqrt().recip();
        put(names.head.into(), vec![facts.vocab, facts.width], 0.0, deviation);
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

struct Stored {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Stored {
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

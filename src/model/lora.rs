//! The flat buffers that all LoRA parameters live in.
//!
//! All pairs share one flat parameter buffer and one flat gradient buffer (f32; f64 in tests), so that the
//! optimizer, the norm and, on a GPU, the all-reduce are each one operation. A [R, K] then B [N, R], site by site.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::facts::sites::Site;
use crate::facts::{LoraInit, LoraOptions};
use crate::ops::flat;

/// The flat buffers of all pairs.
#[derive(Clone, Debug)]
pub struct Trainable {
    pub sites: Vec<Site>,
    /// What the optimizer updates: f32 (f64 in tests).
    pub params: Tensor,
    pub grads: Tensor,
    /// What passes compute with: `params` itself, or its bf16 copy.
    pub compute: Tensor,
}

impl Trainable {
    /// Whether every B is zero: the adapter changes nothing, whatever A is.
    pub fn is_without_effect(&self) -> TensorResult<bool> {
        let params = self.params.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let zero = |site: &Site| {
            let from = site.offset + site.rank * site.projection.cols;
            params[from..][..site.rank * site.projection.rows].iter().all(|value| *value == 0.0)
        };
        Ok(self.sites.iter().all(zero))
    }

    /// A from the initialisation PEFT uses, B zero. Each site draws from its own stream of the seed, so that a
    /// site's values do not depend on which others are chosen.
    ///
    /// `dtype` is the activations'.
    pub fn init(
        sites: Vec<Site>,
        options: &LoraOptions,
        dtype: DType,
        device: &Device,
    ) -> TensorResult<Trainable> {
        let total = sites.iter().map(Site::parameters).sum::<usize>();
        let mut values = vec![0f32; total];
        for site in &sites {
            let a = &mut values[site.offset..][..site.rank * site.projection.cols];
            initialize(a, site, options);
        }
        let master = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let params = Tensor::from_vec(values, total, &Device::Cpu)?.to_dtype(master)?;
        let compute = if dtype == master { None } else { Some(params.to_dtype(dtype)?.to_device(device)?) };
        let params = params.to_device(device)?;
        let grads = params.zeros_like()?;
        Ok(Trainable { sites, grads, compute: compute.unwrap_or_else(|| params.clone()), params })
    }

    /// The copy that passes compute with, where it is not the parameters themselves.
    pub fn copy(&self) -> Option<&Tensor> {
        (self.compute.dtype() != self.params.dtype()).then_some(&self.compute)
    }

    /// Brings the copy that passes compute with up to date with parameters that were read from a file.
    pub fn refresh(&self) -> TensorResult<()> {
        if self.compute.dtype() == self.params.dtype() {
            return Ok(());
        }
        flat::write(&self.compute, &self.params.to_device(&Device::Cpu)?.to_dtype(self.compute.dtype())?)
    }

    /// A [R, K] and B [N, R] of a site as views of one of the flat buffers.
    pub fn views(&self, flat: &Tensor, site: &Site) -> TensorResult<(Tensor, Tensor)> {
        let (rows, cols) = (site.projection.rows, site.projection.cols);
        let a = flat.narrow(0, site.offset, site.rank * cols)?.reshape((site.rank, cols))?;
        let b =
            flat.narrow(0, site.offset + site.rank * cols, rows * site.rank)?.reshape((rows, site.rank))?;
        Ok((a, b))
    }
}

/// Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(K); gaussian has deviation 1/r.
fn initialize(a: &mut [f32], site: &Site, options: &LoraOptions) {
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    random.set_stream(crate::ops::dropout::mix(fnv(&site.path)));
    let mut unit = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let bound = (site.projection.cols as f64).sqrt().recip();
    for value in a {
        *value = match options.init {
            LoraInit::Kaiming => (2.0 * unit() - 1.0) * bound,
            LoraInit::Gaussian => {
                let radius = (-2.0 * (1.0 - unit()).ln()).sqrt();
                radius * (std::f64::consts::TAU * unit()).cos() / site.rank as f64
            }
        } as f32;
    }
}

/// FNV-1a: a stable number for a path.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}

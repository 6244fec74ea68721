//! AdamW on one flat buffer (decoupled weight decay, Loshchilov and Hutter 2019). It clips by a norm that may lie
//! on a GPU.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::number::Number;
use crate::with_real;

/// Elements per task.
const CHUNK: usize = 16_384;

/// The numbers of one update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of a parameter, times the learning rate, that each update subtracts.
    pub weight_decay: f64,
    /// Number of the update, counted from 1; it corrects the moments' bias.
    pub step: u64,
    /// Largest norm of the gradient. A larger gradient is scaled as torch does, by max / (norm + 1e-6).
    pub norm_max: Option<f64>,
}

/// The optimizer's state: first and second moments, as long as the parameters.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor,
    /// Running mean of the squared gradient.
    pub second: Tensor,
}

impl Moments {
    /// Returns moments of zero for `params`.
    pub fn zeros_like(params: &Tensor) -> Result<Moments> {
        Ok(Moments { first: params.zeros_like()?, second: params.zeros_like()? })
    }
}

/// Updates `params` and `moments` in place. The order of operations is torch's; `grads` does not change.
///
/// `squares` is the gradient's sum of squares. It is read on its own device, so nothing waits for a GPU. If it is
/// not finite, the update changes nothing; the caller sees the value later and stops. On a GPU, `copy` receives the
/// parameters in bf16, for products.
pub fn step(
    params: &Tensor,
    grads: &Tensor,
    moments: &Moments,
    update: &Update,
    squares: &Number,
    copy: Option<&Tensor>,
) -> Result<()> {
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return gpu::step(params, grads, moments, update, squares, copy);
    }
    if copy.is_some() {
        bail!("a copy of the parameters in bf16 is for GPUs");
    }
    let squares = squares.value()?;
    if !squares.is_finite() {
        return Ok(());
    }
    let clip = update.norm_max.map_or(1.0, |max| (max / (squares.sqrt() + 1e-6)).min(1.0));
    with_real!(params, T => {
        let bias1 = 1.0 - update.beta1.powi(update.step as i32);
        let bias2 = 1.0 - update.beta2.powi(update.step as i32);
        let b2 = T::of(update.beta2);
        let (c1, c2) = (T::of(1.0 - update.beta1), T::of(1.0 - update.beta2));
        let decay = T::of(1.0 - update.learning_rate * update.weight_decay);
        let (rate, root2) = (T::of(update.learning_rate / bias1), T::of(bias2.sqrt()));
        let (eps, scale) = (T::of(update.epsilon), T::of(clip));
        let g = &*cpu::read::<T>(grads)?;
        cpu::edit(params, |p: &mut [T]| {
            cpu::edit(&moments.first, |m: &mut [T]| {
                cpu::edit(&moments.second, |v: &mut [T]| {
                    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)).zip(g.par_chunks(CHUNK));
                    p.par_chunks_mut(CHUNK).zip(moments).for_each(|(p, ((m, v), g))| {
                        cpu::vectorized(#[inline(always)] || {
                            for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                                let g = g * scale;
                                *m += (g - *m) * c1;
                                *v = *v * b2 + g * g * c2;
                                *p = *p * decay - rate * *m / (Real::sqrt(*v) / root2 + eps);
                            }
                        })
                    })
                })
            })
        })??
    })
}

/// Returns the sum of the squares in f64. Waits for a GPU.
pub fn sum_of_squares(grads: &Tensor) -> Result<f64> {
    Number::squares(grads)?.value()
}

/// The launch of `kernels/adamw.cu`: four parameters per thread.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::DType;

    use super::*;
    use crate::ops::cuda::{self, Launch};

    const THREADS: usize = 256;
    const FOUR: usize = 4;

    /// Makes one update on the GPU. `squares`: the gradient's sum of squares, which decides clipping. `copy`: the bf16
    /// copy of the parameters that is written too.
    pub fn step(
        params: &Tensor,
        grads: &Tensor,
        moments: &Moments,
        update: &Update,
        squares: &Number,
        copy: Option<&Tensor>,
    ) -> Result<()> {
        let Number::There(squares) = squares else {
            bail!("the gradient's sum of squares lies on the host, expected on the GPU")
        };
        let count = params.elem_count();
        if [grads, &moments.first, &moments.second].iter().any(|buffer| buffer.elem_count() != count) {
            bail!("the optimizer's buffers differ in length");
        }
        let bias1 = 1.0 - update.beta1.powi(update.step as i32);
        let bias2 = 1.0 - update.beta2.powi(update.step as i32);
        let launch = Launch::untyped(cuda::device(params)?, "adamw", "step");
        let launch = launch.tensor(params).tensor(grads).tensor(&moments.first).tensor(&moments.second);
        let launch = launch.optional(DType::BF16, copy).of(DType::F64, squares);
        let launch = launch.float(update.norm_max.unwrap_or(0.0));
        let launch = launch.float(1.0 - update.beta1).float(update.beta2).float(1.0 - update.beta2);
        let launch = launch.float(1.0 - update.learning_rate * update.weight_decay);
        let launch = launch.float(update.learning_rate / bias1).float(bias2.sqrt()).float(update.epsilon);
        launch.long(count as u64).launch((count.div_ceil(THREADS * FOUR), 1, 1), THREADS, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;
    use candle_core::{DType, Device};

    fn update(step: u64, norm_max: Option<f64>) -> Update {
        Update {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
            norm_max,
        }
    }

    /// Three clipped updates: the GPU's in f32 equal the host's in f64.
    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for count in [1, 3, 4, 1027] {
                let start = judge::random(count, 1)?.to_dtype(DType::F32)?.detach();
                let (host, device) = (start.to_dtype(DType::F64)?, start.to_device(&gpu.device)?);
                let (host_moments, moments) = (Moments::zeros_like(&host)?, Moments::zeros_like(&device)?);
                let copy = Tensor::zeros(count, DType::BF16, &gpu.device)?;
                for step in 1..=3 {
                    let grads = judge::random(count, 2 + step)?.to_dtype(DType::F32)?.detach();
                    let norm_max = [None, Some(0.5), Some(1e9)][step as usize - 1];
                    let grads = (grads.to_dtype(DType::F64)?, grads.to_device(&gpu.device)?);
                    let squares = (Number::squares(&grads.0)?, Number::squares(&grads.1)?);
                    let update = update(step, norm_max);
                    super::step(&host, &grads.0, &host_moments, &update, &squares.0, None)?;
                    super::step(&device, &grads.1, &moments, &update, &squares.1, Some(&copy))?;
                    let after = (sum_of_squares(&grads.1)?, squares.1.value()?);
                    assert_eq!(after.0, after.1, "the gradient stays as it is");
                }
                gpu.within(1e-6, &device, &host)?;
                gpu.within(1e-6, &moments.first, &host_moments.first)?;
                gpu.within(1e-6, &moments.second, &host_moments.second)?;
                gpu.within(0.0, &copy, &device.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?)?;
            }
            Ok(())
        })
    }

    #[test]
    fn a_norm_that_is_not_finite_changes_nothing() -> Result<()> {
        let check = |device: &Device| -> Result<()> {
            let params = Tensor::new(&[1f32, 2.0, 3.0, 4.0, 5.0], device)?;
            for bad in [f32::NAN, f32::INFINITY] {
                let grads = Tensor::new(&[0f32, bad, 0.0, 1.0, 1.0], device)?;
                let (squares, moments) = (Number::squares(&grads)?, Moments::zeros_like(&params)?);
                assert!(!squares.value()?.is_finite());
                step(&params, &grads, &moments, &update(1, Some(1.0)), &squares, None)?;
                assert_eq!(params.to_vec1::<f32>()?, [1.0, 2.0, 3.0, 4.0, 5.0]);
                assert_eq!(sum_of_squares(&moments.first)?, 0.0);
            }
            Ok(())
        };
        check(&Device::Cpu)?;
        judge::on_gpu(|gpu| check(&gpu.device))
    }
}

//! Cross-entropy of the next token over an output head, in chunks of rows: all logits never exist at once.
//!
//!
//! `loss = sum over rows of logsumexp(h W^T) - (h W^T)[target]`; the caller divides by the supervised tokens
//! of the whole optimizer step. The logits' gradient, softmax minus one-hot, replaces them in place.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::bias;
use super::cpu::{self, Real};
use super::matmul::{self, Precision, Weight};
use crate::with_real;

/// Logits held at a time.
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// The output head: `logits = scale * h W^T + bias`, then `cap * tanh(logits / cap)` where there is a cap.
#[derive(Clone, Debug)]
pub struct Head {
    /// [V, C]
    pub weight: Weight,
    /// `[V]` (phi-2)
    pub bias: Option<Tensor>,
    /// 1, or less (Granite).
    pub scale: f64,
    /// Gemma 2.
    pub softcap: Option<f64>,
}

impl Head {
    pub fn plain(weight: Weight) -> Head {
        Head { weight, bias: None, scale: 1.0, softcap: None }
    }

    /// `scale * h W^T + bias` [rows, V], before the cap.
    fn product(&self, hidden: &Tensor, precision: Precision) -> Result<Tensor> {
        let shape = (hidden.dim(0)?, self.weight.dims().0);
        let logits = Tensor::zeros(shape, hidden.dtype(), hidden.device())?;
        if let Some(bias) = &self.bias {
            bias::apply(bias, &logits, 0, false)?;
        }
        let beta = if self.bias.is_some() { 1.0 } else { 0.0 };
        matmul::forward(hidden, &self.weight, self.scale, &logits, 0, beta, precision)?;
        Ok(logits)
    }
}

/// The definition over all logits [rows, V], in differentiable primitives.
pub fn formula(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(1)?.detach();
    let log_sum = (logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(1)?.log()? + largest)?;
    (log_sum - logits.gather(&targets.unsqueeze(1)?, 1)?)?.sum_all()
}

/// hidden [rows, C], one target a row -> the sum of losses.
pub fn forward(hidden: &Tensor, head: &Head, targets: &[u32], precision: Precision) -> Result<f64> {
    each_chunk(hidden, head, targets, precision, |logits, targets, _, _| {
        rows_loss(logits, targets, head.softcap, None)
    })
}

/// As `forward`, and the gradient of `scale * loss` with respect to hidden, [rows, C].
pub fn forward_backward(
    hidden: &Tensor,
    head: &Head,
    targets: &[u32],
    scale: f64,
    precision: Precision,
) -> Result<(f64, Tensor)> {
    let dh = hidden.zeros_like()?;
    let loss = each_chunk(hidden, head, targets, precision, |logits, targets, from, rows| {
        let loss = rows_loss(logits, targets, head.softcap, Some(scale))?;
        matmul::input_gradient(
            logits,
            0,
            &head.weight,
            head.scale,
            &dh.narrow(0, from, rows)?,
            0.0,
            precision,
        )?;
        Ok(loss)
    })?;
    Ok((loss, dh))
}

fn each_chunk(
    hidden: &Tensor,
    head: &Head,
    targets: &[u32],
    precision: Precision,
    mut body: impl FnMut(&Tensor, &[u32], usize, usize) -> Result<f64>,
) -> Result<f64> {
    let ((rows, _), (vocab, _)) = (hidden.dims2()?, head.weight.dims());
    assert_eq!(rows, targets.len(), "one target a row");
    let chunk = (CHUNK_BYTES_MAX / (vocab * hidden.dtype().size_in_bytes())).clamp(16, 4096);
    let mut loss = 0.0;
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let (from, rows) = (i * chunk, targets.len());
        let logits = head.product(&hidden.narrow(0, from, rows)?, precision)?;
        loss += body(&logits, targets, from, rows)?;
    }
    Ok(loss)
}

/// Sum of the rows' losses; with `scale`, the logits become the gradient of scale * loss.
fn rows_loss(logits: &Tensor, targets: &[u32], softcap: Option<f64>, scale: Option<f64>) -> Result<f64> {
    let vocab = logits.dim(1)?;
    with_real!(logits, T => {
        let losses: Vec<f64> = cpu::edit(logits, |logits: &mut [T]| {
            logits
                .par_chunks_mut(vocab)
                .zip(targets)
                .map_init(Vec::new, |slopes, (row, &target)| {
                    cpu::vectorized(#[inline(always)] || match softcap {
                        None => row_loss(row, target as usize, scale),
                        Some(cap) => {
                            cap_row(row, T::of(cap), slopes);
                            let loss = row_loss(row, target as usize, scale);
                            row.iter_mut().zip(slopes.iter()).for_each(|(d, &slope)| *d *= slope);
                            loss
                        }
                    })
                })
                .collect()
        })?;
        Ok(losses.into_iter().sum())
    })
}

/// Caps the logits and keeps the slope at each, 1 - tanh^2.
#[inline(always)]
fn cap_row<T: Real>(row: &mut [T], cap: T, slopes: &mut Vec<T>) {
    slopes.resize(row.len(), T::ZERO);
    for (logit, slope) in row.iter_mut().zip(slopes.iter_mut()) {
        let t = Real::tanh(*logit / cap);
        *logit = cap * t;
        *slope = T::ONE - t * t;
    }
}

/// With `scale`, the logits become scale * (softmax - one-hot).
#[inline(always)]
fn row_loss<T: Real>(row: &mut [T], target: usize, scale: Option<f64>) -> f64 {
    let largest = cpu::largest(row);
    let at_target = row[target];
    for logit in row.iter_mut() {
        *logit = Real::exp(*logit - largest);
    }
    let sum = cpu::sum(row);
    if let Some(scale) = scale {
        let factor = T::of(scale) / sum;
        row.iter_mut().for_each(|p| *p *= factor);
        row[target] -= T::of(scale);
    }
    sum.wide().ln() + largest.wide() - at_target.wide()
}

/// Logits [rows, V] themselves; for tests and generation.
pub fn logits(hidden: &Tensor, head: &Head, precision: Precision) -> Result<Tensor> {
    let logits = head.product(hidden, precision)?;
    let logits = match head.softcap {
        Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        None => logits,
    };
    logits.to_dtype(match hidden.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;
    use candle_core::Device;

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width, vocab) in [(1, 3, 5), (37, 20, 131), (5, 8, 16)] {
            for (scale, softcap, biased) in [(1.0, None, false), (0.3, Some(2.0), false), (1.0, None, true)] {
                let (hidden, weight) = (judge::random((rows, width), 1)?, judge::random((vocab, width), 2)?);
                let bias = match biased {
                    true => Some(judge::random(vocab, 3)?.as_tensor().clone()),
                    false => None,
                };
                let mut product = (hidden.matmul(&weight.t()?)? * scale)?;
                if let Some(bias) = &bias {
                    product = product.broadcast_add(bias)?;
                }
                if let Some(cap) = softcap {
                    product = ((product / cap)?.tanh()? * cap)?;
                }
                let head = Head { weight: Weight::Dense(weight.as_tensor().clone()), bias, scale, softcap };
                judge::same(&logits(&hidden, &head, Precision::F32)?, &product, 1e-12)?;
                check(&hidden, &head, &product)?;
            }
        }
        Ok(())
    }

    fn check(hidden: &Tensor, head: &Head, product: &Tensor) -> Result<()> {
        let (rows, vocab) = product.dims2()?;
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
        let expected = formula(product, &Tensor::new(targets.as_slice(), &Device::Cpu)?)?;
        let (loss, dh) = forward_backward(hidden, head, &targets, 0.25, Precision::F32)?;
        assert!((loss - expected.to_scalar::<f64>()?).abs() < 1e-10);
        assert!((forward(hidden, head, &targets, Precision::F32)? - loss).abs() < 1e-12);
        let scale = Tensor::new(0.25f64, &Device::Cpu)?;
        judge::same(&dh, &judge::gradient(hidden, &expected, &scale)?, 1e-12)
    }

    #[test]
    fn a_bad_logit_is_never_hidden() -> Result<()> {
        let hidden = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu)?;
        let head = Head::plain(Weight::Dense(Tensor::ones((40, 2), DType::F32, &Device::Cpu)?));
        assert!(forward(&hidden, &head, &[3], Precision::F32)?.is_nan());
        Ok(())
    }
}

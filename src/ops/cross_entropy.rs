//! Cross-entropy of the next token over an output head, in chunks of rows: all logits never exist at once.
//!
//!
//! `loss = sum over rows of logsumexp(h W^T) - (h W^T)[target]`; the caller divides by the supervised tokens
//! of the whole optimizer step. The logits' gradient, softmax minus one-hot, replaces them in place.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::matmul::{self, Precision, Weight};
use crate::with_real;

/// Logits held at a time.
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// The definition over all logits [rows, V], in differentiable primitives.
pub fn formula(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(1)?.detach();
    let log_sum = (logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(1)?.log()? + largest)?;
    (log_sum - logits.gather(&targets.unsqueeze(1)?, 1)?)?.sum_all()
}

/// hidden [rows, C], head [V, C], one target a row -> the sum of losses.
pub fn forward(hidden: &Tensor, head: &Weight, targets: &[u32], precision: Precision) -> Result<f64> {
    each_chunk(hidden, head, targets, precision, |logits, targets, _, _| rows_loss(logits, targets, None))
}

/// As `forward`, and the gradient of `scale * loss` with respect to hidden, [rows, C].
pub fn forward_backward(
    hidden: &Tensor,
    head: &Weight,
    targets: &[u32],
    scale: f64,
    precision: Precision,
) -> Result<(f64, Tensor)> {
    let dh = hidden.zeros_like()?;
    let loss = each_chunk(hidden, head, targets, precision, |logits, targets, from, rows| {
        let loss = rows_loss(logits, targets, Some(scale))?;
        matmul::input_gradient(logits, 0, head, 1.0, &dh.narrow(0, from, rows)?, 0.0, precision)?;
        Ok(loss)
    })?;
    Ok((loss, dh))
}

fn each_chunk(
    hidden: &Tensor,
    head: &Weight,
    targets: &[u32],
    precision: Precision,
    mut body: impl FnMut(&Tensor, &[u32], usize, usize) -> Result<f64>,
) -> Result<f64> {
    let ((rows, _), (vocab, _)) = (hidden.dims2()?, head.dims());
    assert_eq!(rows, targets.len(), "one target a row");
    let chunk = (CHUNK_BYTES_MAX / (vocab * hidden.dtype().size_in_bytes())).clamp(16, 4096);
    let mut loss = 0.0;
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let (from, rows) = (i * chunk, targets.len());
        let logits = Tensor::zeros((rows, vocab), hidden.dtype(), &Device::Cpu)?;
        matmul::forward(&hidden.narrow(0, from, rows)?, head, 1.0, &logits, 0, 0.0, precision)?;
        loss += body(&logits, targets, from, rows)?;
    }
    Ok(loss)
}

/// Sum of the rows' losses; with `scale`, the logits become scale * (softmax - one-hot).
fn rows_loss(logits: &Tensor, targets: &[u32], scale: Option<f64>) -> Result<f64> {
    let vocab = logits.dim(1)?;
    with_real!(logits, T => {
        let losses: Vec<f64> = cpu::edit(logits, |logits: &mut [T]| {
            logits
                .par_chunks_mut(vocab)
                .zip(targets)
                .map(|(row, &target)| {
                    cpu::vectorized(#[inline(always)] || row_loss(row, target as usize, scale))
                })
                .collect()
        })?;
        Ok(losses.into_iter().sum())
    })
}

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
pub fn logits(hidden: &Tensor, head: &Weight, precision: Precision) -> Result<Tensor> {
    let logits = Tensor::zeros((hidden.dim(0)?, head.dims().0), hidden.dtype(), &Device::Cpu)?;
    matmul::forward(hidden, head, 1.0, &logits, 0, 0.0, precision)?;
    logits.to_dtype(match hidden.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width, vocab) in [(1, 3, 5), (37, 20, 131), (5, 8, 16)] {
            let (hidden, head) = (judge::random((rows, width), 1)?, judge::random((vocab, width), 2)?);
            let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
            let ids = Tensor::new(targets.as_slice(), &Device::Cpu)?;
            let expected = formula(&hidden.matmul(&head.t()?)?, &ids)?;
            let weight = Weight::Dense(head.as_tensor().clone());
            let (loss, dh) = forward_backward(&hidden, &weight, &targets, 0.25, Precision::F32)?;
            assert!((loss - expected.to_scalar::<f64>()?).abs() < 1e-10);
            assert!((forward(&hidden, &weight, &targets, Precision::F32)? - loss).abs() < 1e-12);
            let scale = Tensor::new(0.25f64, &Device::Cpu)?;
            judge::same(&dh, &judge::gradient(&hidden, &expected, &scale)?, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn a_bad_logit_is_never_hidden() -> Result<()> {
        let hidden = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu)?;
        let head = Weight::Dense(Tensor::ones((40, 2), DType::F32, &Device::Cpu)?);
        assert!(forward(&hidden, &head, &[3], Precision::F32)?.is_nan());
        Ok(())
    }
}

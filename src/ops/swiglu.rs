//! Gated activation: `h = silu(gate) * up` from one matrix [T, 2F] that holds gate, then up.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

const ROWS: usize = 16;

/// The definition, in differentiable primitives.
pub fn formula(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dim(D::Minus1)? / 2;
    gate_up.narrow(D::Minus1, 0, width)?.silu()? * gate_up.narrow(D::Minus1, width, width)?
}

/// gate_up [T, 2F] -> h [T, F].
pub fn forward(gate_up: &Tensor) -> Result<Tensor> {
    let (rows, double) = gate_up.dims2()?;
    let width = double / 2;
    with_real!(gate_up, T => {
        let mut h = vec![T::ZERO; rows * width];
        let gate_up = &*cpu::read::<T>(gate_up)?;
        h.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks(ROWS * double)).for_each(|(h, gate_up)| {
            cpu::vectorized(#[inline(always)] || {
                for (h, gate_up) in h.chunks_mut(width).zip(gate_up.chunks(double)) {
                    let (gate, up) = gate_up.split_at(width);
                    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
                        *h = gate * sigmoid(gate) * up;
                    }
                }
            })
        });
        cpu::tensor(h, (rows, width))
    })
}

/// dh [T, F] -> the gradient of gate_up [T, 2F].
pub fn backward(dh: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let (rows, double) = gate_up.dims2()?;
    let width = double / 2;
    with_real!(gate_up, T => {
        let mut d = vec![T::ZERO; rows * double];
        let (gate_up, dh) = (&*cpu::read::<T>(gate_up)?, &*cpu::read::<T>(dh)?);
        let rows_of = gate_up.par_chunks(ROWS * double).zip(dh.par_chunks(ROWS * width));
        d.par_chunks_mut(ROWS * double).zip(rows_of).for_each(|(d, (gate_up, dh))| {
            cpu::vectorized(#[inline(always)] || {
                for ((d, gate_up), dh) in d.chunks_mut(double).zip(gate_up.chunks(double)).zip(dh.chunks(width)) {
                    backward_row(d, gate_up, dh);
                }
            })
        });
        cpu::tensor(d, (rows, double))
    })
}

/// silu'(g) = s * (1 + g * (1 - s)), with s = sigmoid(g).
#[inline(always)]
fn backward_row<T: Real>(d: &mut [T], gate_up: &[T], dh: &[T]) {
    let (gate, up) = gate_up.split_at(dh.len());
    let (d_gate, d_up) = d.split_at_mut(dh.len());
    for ((((d_gate, d_up), &gate), &up), &dh) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dh) {
        let s = sigmoid(gate);
        *d_gate = dh * up * s * (T::ONE + gate * (T::ONE - s));
        *d_up = dh * gate * s;
    }
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + Real::exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width) in [(1, 1), (3, 7), (37, 66)] {
            let (x, dh) = (judge::random((rows, 2 * width), 1)?, judge::random((rows, width), 2)?);
            judge::same(&forward(&x)?, &formula(&x)?, 1e-12)?;
            judge::same(&backward(&dh, &x)?, &judge::gradient(&x, &formula(&x)?, &dh)?, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        let (x, dh) = (judge::random((2, 6), 1)?, judge::random((2, 3), 2)?);
        judge::finite_differences(&x, &dh, &backward(&dh, &x)?, 1e-7, forward)
    }
}

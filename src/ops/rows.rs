//! Rows out of and into a matrix: the supervised rows before the output head, and their gradient after it.
//!

use candle_core::{Result, Tensor};

use super::cpu;
use crate::with_real;

/// x [T, C] -> its rows `index` [rows, C].
pub fn gather(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    let (_, width) = x.dims2()?;
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        let mut y = Vec::with_capacity(index.len() * width);
        index.iter().for_each(|&row| y.extend_from_slice(&x[row as usize * width..][..width]));
        cpu::tensor(y, (index.len(), width))
    })
}

/// The transpose of `gather` for distinct rows: zero [T, C] with `y`'s rows at `index`.
pub fn scatter(y: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
    let (_, width) = y.dims2()?;
    with_real!(y, T => {
        let y = &*cpu::read::<T>(y)?;
        let mut x = vec![<T as cpu::Real>::ZERO; rows * width];
        for (&row, values) in index.iter().zip(y.chunks(width)) {
            x[row as usize * width..][..width].copy_from_slice(values);
        }
        cpu::tensor(x, (rows, width))
    })
}

/// `x += y` in place, same shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<()> {
    assert_eq!(x.dims(), y.dims(), "shapes of a sum");
    with_real!(x, T => {
        let y = &*cpu::read::<T>(y)?;
        cpu::edit(x, |x: &mut [T]| x.iter_mut().zip(y).for_each(|(x, &y)| *x += y))
    })
}

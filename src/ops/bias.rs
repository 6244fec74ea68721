//! Bias of a linear layer, written into or added to a column range. Frozen: no gradient.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::cpu;
use crate::with_real;

/// `y[:, at..at+N] = bias` or, with `add`, `+= bias`; bias `[N]`, y [T, at+N or wider].
pub fn apply(bias: &Tensor, y: &Tensor, at: usize, add: bool) -> Result<()> {
    let (n, (_, width)) = (bias.dims1()?, y.dims2()?);
    assert!(at + n <= width, "a bias of {n} at {at} of {width}");
    with_real!(y, T => {
        let bias = &*cpu::read::<T>(bias)?;
        cpu::edit(y, |y: &mut [T]| {
            y.par_chunks_mut(width).with_min_len(64).for_each(|row| {
                let row = &mut row[at..at + n];
                match add {
                    true => row.iter_mut().zip(bias).for_each(|(y, &bias)| *y += bias),
                    false => row.copy_from_slice(bias),
                }
            })
        })
    })
}

//! Rotary position embedding, in place: each pair (`x[i]`, `x[i + half]`) of a head turns by `position * frequency[i]`.
//!
//!
//! The halves are split as in GPT-NeoX and HF (first half, second half), not interleaved. With a partial
//! rotary factor only the first `2 * half` elements of a head turn.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

const ROWS: usize = 16;

/// Cosine and sine of each row's angles, both [T, half], already times the attention factor.
#[derive(Clone, Debug)]
pub struct Angles {
    pub cos: Tensor,
    pub sin: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    /// The transpose of the rotation: the gradient.
    Backward,
}

/// The definition on x [T, heads, width], in differentiable primitives.
pub fn formula(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let half = angles.cos.dim(1)?;
    let (cos, sin) = (angles.cos.unsqueeze(1)?, angles.sin.unsqueeze(1)?); // [T, 1, half]
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rest = x.dim(2)? - 2 * half;
    Tensor::cat(&[turned_a, turned_b, x.narrow(2, 2 * half, rest)?.contiguous()?], 2)
}

/// Turns the first `heads` heads of `width` in each row of x [T, any], in place.
pub fn rotate(x: &Tensor, heads: usize, width: usize, angles: &Angles, direction: Direction) -> Result<()> {
    let (rows, stride) = x.dims2()?;
    let (angle_rows, half) = angles.cos.dims2()?;
    assert!(heads * width <= stride && 2 * half <= width && angle_rows == rows, "rope on [{rows}, {stride}]");
    with_real!(x, T => {
        let sign = if direction == Direction::Forward { T::ONE } else { -T::ONE };
        let (cos, sin) = (&*cpu::read::<T>(&angles.cos)?, &*cpu::read::<T>(&angles.sin)?);
        cpu::edit(x, |x: &mut [T]| {
            let angles = cos.par_chunks(ROWS * half).zip(sin.par_chunks(ROWS * half));
            x.par_chunks_mut(ROWS * stride).zip(angles).for_each(|(x, (cos, sin))| {
                cpu::vectorized(#[inline(always)] || {
                    for ((x, cos), sin) in x.chunks_mut(stride).zip(cos.chunks(half)).zip(sin.chunks(half)) {
                        for head in x[..heads * width].chunks_mut(width) {
                            turn(head, cos, sin, sign);
                        }
                    }
                })
            })
        })
    })
}

#[inline(always)]
fn turn<T: Real>(head: &mut [T], cos: &[T], sin: &[T], sign: T) {
    let (a, b) = head.split_at_mut(cos.len());
    for i in 0..cos.len() {
        let (x, y, sine) = (a[i], b[i], sin[i] * sign);
        a[i] = x * cos[i] - y * sine;
        b[i] = y * cos[i] + x * sine;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    /// (rows, heads, width, half, rows' stride): full and partial rotation, odd sizes.
    const CASES: [(usize, usize, usize, usize, usize); 3] =
        [(1, 1, 2, 1, 2), (5, 3, 8, 3, 29), (33, 4, 16, 8, 96)];

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, heads, width, half, stride) in CASES {
            let x = judge::random((rows, stride), 1)?;
            let theta = judge::random((rows, half), 2)?;
            let angles = Angles { cos: theta.cos()?.detach(), sin: theta.sin()?.detach() };
            let turned = |x: &Tensor| -> Result<Tensor> {
                let part = x.narrow(1, 0, heads * width)?.contiguous()?.reshape((rows, heads, width))?;
                let part = formula(&part, &angles)?.reshape((rows, heads * width))?;
                Tensor::cat(&[&part, &x.narrow(1, heads * width, stride - heads * width)?.contiguous()?], 1)
            };
            let y = x.copy()?;
            rotate(&y, heads, width, &angles, Direction::Forward)?;
            judge::same(&y, &turned(&x)?, 1e-12)?;
            let dy = judge::random((rows, stride), 3)?;
            let dx = dy.copy()?;
            rotate(&dx, heads, width, &angles, Direction::Backward)?;
            judge::same(&dx, &judge::gradient(&x, &turned(&x)?, &dy)?, 1e-12)?;
        }
        Ok(())
    }
}

//! Root-mean-square norm of groups of columns, in place: of queries and keys before rope, head by head or all at
//! once.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

const ROWS: usize = 16;

/// The columns of the groups in a row: `count` groups, one after the other, from column `at` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// First column of the first group.
    pub at: usize,
    /// Number of groups.
    pub count: usize,
}

/// Returns the definition on x [T, count * D] with w `[D]`, in differentiable primitives.
pub fn formula(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let ((rows, columns), width) = (x.dims2()?, w.dims1()?);
    let x = x.contiguous()?.reshape((rows, columns / width, width))?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(w)?.reshape((rows, columns))
}

/// `x = w * x / rms(x)` in each group, in place: x [T, any], w `[D]` with D the width of a group.
pub fn forward(x: &Tensor, groups: Groups, w: &Tensor, eps: f64) -> Result<()> {
    let ((_, stride), width) = (x.dims2()?, w.dims1()?);
    assert!(groups.at + groups.count * width <= stride, "{groups:?} of {width} in {stride}");
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward(x, groups, w, eps);
    }
    with_real!(x, T => {
        let w = &*cpu::read::<T>(w)?;
        cpu::edit(x, |x: &mut [T]| {
            x.par_chunks_mut(ROWS * stride).for_each(|x| {
                cpu::vectorized(#[inline(always)] || {
                    for row in x.chunks_mut(stride) {
                        for x in row[groups.at..][..groups.count * width].chunks_mut(width) {
                            let scale = reciprocal_rms(x, eps);
                            x.iter_mut().zip(w).for_each(|(x, &w)| *x = *x * scale * w);
                        }
                    }
                })
            })
        })
    })
}

/// Turns the gradient of the norm's output in `d` [T, any] into that of its input, in place. `x` [T, any] holds the
/// input in the same columns.
pub fn backward(d: &Tensor, x: &Tensor, groups: Groups, w: &Tensor, eps: f64) -> Result<()> {
    let ((rows, stride), (x_rows, x_stride), width) = (d.dims2()?, x.dims2()?, w.dims1()?);
    let end = groups.at + groups.count * width;
    assert!(end <= stride.min(x_stride) && rows == x_rows, "{groups:?} of {width} in {stride}, {x_stride}");
    #[cfg(feature = "cuda")]
    if d.device().is_cuda() {
        return gpu::backward(d, x, groups, w, eps);
    }
    with_real!(x, T => {
        let (x, w) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(w)?);
        cpu::edit(d, |d: &mut [T]| {
            d.par_chunks_mut(ROWS * stride).zip(x.par_chunks(ROWS * x_stride)).for_each(|(d, x)| {
                cpu::vectorized(#[inline(always)] || {
                    for (d, x) in d.chunks_mut(stride).zip(x.chunks(x_stride)) {
                        let groups = d[groups.at..end].chunks_mut(width).zip(x[groups.at..end].chunks(width));
                        for (d, x) in groups {
                            backward_group(d, x, w, eps);
                        }
                    }
                })
            })
        })
    })
}

/// `d = (d*w - n * mean(d*w*n)) / rms`, with `n = x / rms`.
#[inline(always)]
fn backward_group<T: Real>(d: &mut [T], x: &[T], w: &[T], eps: f64) {
    let scale = reciprocal_rms(x, eps);
    let pull = scale * scale * scale * cpu::dot3(d, w, x) / T::of(x.len() as f64);
    for ((d, &x), &w) in d.iter_mut().zip(x).zip(w) {
        *d = *d * w * scale - x * pull;
    }
}

#[inline(always)]
fn reciprocal_rms<T: Real>(x: &[T], eps: f64) -> T {
    T::ONE / Real::sqrt(cpu::dot(x, x) / T::of(x.len() as f64) + T::of(eps))
}

/// The launches of `kernels/head_norm.cu`: one warp per group; w is f32.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use super::Groups;
    use crate::ops::cuda::Launch;

    const WARPS: usize = 4;

    fn grid(rows: usize, groups: Groups) -> (usize, usize, usize) {
        (rows, groups.count.div_ceil(WARPS), 1)
    }

    /// Normalises the groups of `x` in place.
    pub fn forward(x: &Tensor, groups: Groups, w: &Tensor, eps: f64) -> Result<()> {
        let ((rows, stride), width) = (x.dims2()?, w.dims1()?);
        let launch = Launch::new(x, "head_norm", "forward")?.tensor(x).of(DType::F32, w).int(stride);
        let launch = launch.int(groups.at).int(groups.count).int(width).float(eps);
        launch.launch(grid(rows, groups), WARPS * 32, 0)
    }

    /// Turns the gradient `d` of the result into that of `x`, in place.
    pub fn backward(d: &Tensor, x: &Tensor, groups: Groups, w: &Tensor, eps: f64) -> Result<()> {
        let ((rows, stride), (_, x_stride), width) = (d.dims2()?, x.dims2()?, w.dims1()?);
        let launch = Launch::new(d, "head_norm", "backward")?.tensor(d).tensor(x).of(DType::F32, w);
        let launch = launch.int(stride).int(x_stride);
        let launch = launch.int(groups.at).int(groups.count).int(width).float(eps);
        launch.launch(grid(rows, groups), WARPS * 32, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, before, count, width, behind) in CASES.into_iter().chain([(3, 16, 5, 96, 8)]) {
                let kept = before + count * width;
                let w = (gpu.random(width, 2)?.as_tensor() + 1.0)?.to_dtype(gpu.dtype)?;
                let (w, w_gpu) = (w.to_dtype(DType::F64)?, gpu.put_as(DType::F32, &w)?);
                let groups = Groups { at: before, count };
                let x = gpu.random((rows, kept + behind), 1)?;
                let (found, expected) = (gpu.put(&x)?, x.copy()?);
                forward(&found, groups, &w_gpu, 1e-5)?;
                forward(&expected, groups, &w, 1e-5)?;
                gpu.same(&found, &expected)?;
                let (d, x) = (gpu.random((rows, kept + behind), 3)?, gpu.random((rows, kept), 4)?);
                let (found, expected) = (gpu.put(&d)?, d.copy()?);
                backward(&found, &gpu.put(&x)?, groups, &w_gpu, 1e-5)?;
                backward(&expected, &x, groups, &w, 1e-5)?;
                // In a group of one column the terms cancel except for eps, so the comparison is by the terms'
                // size.
                let found = (found.to_device(&Device::Cpu)?.to_dtype(DType::F64)? + d.as_tensor())?;
                gpu.same(&found, &(expected + d.as_tensor())?)?;
            }
            Ok(())
        })
    }

    /// (rows, columns before, groups, width, columns after)
    const CASES: [(usize, usize, usize, usize, usize); 3] =
        [(1, 0, 1, 1, 0), (5, 3, 4, 6, 2), (33, 0, 2, 32, 7)];

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, before, count, width, behind) in CASES {
            let (middle, stride) = (count * width, before + count * width + behind);
            let x = judge::random((rows, stride), 1)?;
            let w = (judge::random(width, 2)?.as_tensor() + 1.0)?;
            let part = |from: usize, columns: usize| x.narrow(1, from, columns)?.contiguous();
            let normed = formula(&part(before, middle)?, &w, 1e-5)?;
            let expected = Tensor::cat(&[part(0, before)?, normed, part(before + middle, behind)?], 1)?;
            let groups = Groups { at: before, count };
            let y = x.copy()?;
            forward(&y, groups, &w, 1e-5)?;
            judge::same(&y, &expected, 1e-12)?;
            let dy = judge::random((rows, stride), 3)?;
            let d = dy.copy()?;
            let kept = x.narrow(1, 0, before + middle)?.force_contiguous()?;
            backward(&d, &kept, groups, &w, 1e-5)?;
            judge::same(&d, &judge::gradient(&x, &expected, &dy)?, 1e-11)?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        let (x, w, dy) = (judge::random((2, 8), 1)?, judge::random(3, 2)?, judge::random((2, 8), 3)?);
        let groups = Groups { at: 1, count: 2 };
        let d = dy.copy()?;
        backward(&d, &x, groups, &w, 1e-5)?;
        judge::finite_differences(&x, &dy, &d, 1e-7, |x| {
            let y = x.copy()?;
            forward(&y, groups, &w, 1e-5)?;
            Ok(y)
        })
    }
}

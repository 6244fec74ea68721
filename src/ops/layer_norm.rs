//! Layer norm of each row of C: `y = w * (x - mean) / sqrt(var + eps) + b`.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
#[cfg(feature = "cuda")]
use super::fp8::{self, Scaled};
use crate::with_real;

/// Rows per task: a few hundred kilobytes.
const ROWS: usize = 64;

/// Returns the definition, in differentiable primitives; the functions below are compared with it.
pub fn formula(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    centred.broadcast_mul(&scale)?.broadcast_mul(w)?.broadcast_add(b)
}

/// x [T, C], w `[C]`, b `[C]` -> y [T, C].
pub fn forward(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    forward_beside(x, w, b, eps, 0)
}

/// Does `forward` into the first columns of [T, C + spare]; the spare columns are not written. They need a GPU.
pub fn forward_beside(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64, spare: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward(x, w, b, eps, spare, None);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(x, T => {
        let mut y = vec![T::ZERO; rows * width];
        let (x, w, b) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(w)?, &*cpu::read::<T>(b)?);
        y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(y, x)| {
            cpu::vectorized(#[inline(always)] || {
                for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                    let scale = centre(y, x, eps);
                    for ((y, &w), &b) in y.iter_mut().zip(w).zip(b) {
                        *y = (*y * scale).fma(w, b);
                    }
                }
            })
        });
        cpu::tensor(y, (rows, width))
    })
}

/// Does `forward_beside` on a GPU, and also returns the result without its spare columns in 8 bits.
#[cfg(feature = "cuda")]
pub fn forward_rounded(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f64,
    spare: usize,
) -> Result<(Tensor, Scaled)> {
    let rounded = fp8::empty(x.dim(0)?, x.dim(1)?, x)?;
    Ok((gpu::forward(x, w, b, eps, spare, Some(&rounded))?, rounded))
}

/// Adds the gradient of x to `dx`: with n = (x - mean) / s and g = dy * w,
/// `dx += (g - mean(g) - n * mean(g * n)) / s`. Weight and bias are frozen. On a GPU, `dx` may have more columns than x
/// behind those that are added to.
pub fn backward(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64, dx: &Tensor) -> Result<()> {
    let (_, width) = x.dims2()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::backward(dy, x, w, eps, dx, None);
    }
    with_real!(x, T => {
        let (x, w, dy) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(w)?, &*cpu::read::<T>(dy)?);
        cpu::edit(dx, |dx: &mut [T]| {
            let rows = x.par_chunks(ROWS * width).zip(dy.par_chunks(ROWS * width));
            dx.par_chunks_mut(ROWS * width).zip(rows).for_each(|(dx, (x, dy))| {
                let mut centred = vec![T::ZERO; width];
                cpu::vectorized(#[inline(always)] || {
                    for ((dx, x), dy) in dx.chunks_mut(width).zip(x.chunks(width)).zip(dy.chunks(width)) {
                        let scale = centre(&mut centred, x, eps);
                        backward_row(dx, &centred, scale, dy, w);
                    }
                })
            })
        })
    })
}

/// Does `backward` on a GPU. Returns the sum in `dx`, without columns behind x's, in 8 bits.
#[cfg(feature = "cuda")]
pub fn backward_rounded(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64, dx: &Tensor) -> Result<Scaled> {
    let rounded = fp8::empty(x.dim(0)?, x.dim(1)?, x)?;
    gpu::backward(dy, x, w, eps, dx, Some(&rounded))?;
    Ok(rounded)
}

/// Sets `centred = x - mean` and returns 1 / sqrt(var + eps). It takes two passes, so that a mean far from zero
/// costs the variance no digits.
#[inline(always)]
fn centre<T: Real>(centred: &mut [T], x: &[T], eps: f64) -> T {
    let count = T::of(x.len() as f64);
    let mean = cpu::sum(x) / count;
    for (centred, &x) in centred.iter_mut().zip(x) {
        *centred = x - mean;
    }
    T::ONE / Real::sqrt(cpu::dot(centred, centred) / count + T::of(eps))
}

#[inline(always)]
fn backward_row<T: Real>(dx: &mut [T], centred: &[T], scale: T, dy: &[T], w: &[T]) {
    let count = T::of(centred.len() as f64);
    let mean = cpu::dot(dy, w) / count;
    let pull = scale * scale * cpu::dot3(dy, w, centred) / count;
    for (((dx, &centred), &dy), &w) in dx.iter_mut().zip(centred).zip(dy).zip(w) {
        *dx += (dy * w - mean - centred * pull) * scale;
    }
}

/// The launches of `kernels/layer_norm.cu`: one block per row; w and b are f32.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, Result, Tensor};

    use crate::ops::cuda::Launch;
    use crate::ops::fp8::Scaled;

    const THREADS: usize = 256;

    /// Returns the norm of each row of `x`, on the GPU, with spare columns behind it. `rounded` gets it in 8 bits.
    pub fn forward(
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        eps: f64,
        spare: usize,
        rounded: Option<&Scaled>,
    ) -> Result<Tensor> {
        let ((rows, width), stride) = (x.dims2()?, x.dim(1)? + spare);
        let y = crate::ops::unwritten((rows, stride), x.dtype(), x.device())?;
        let name = rounded.map_or("forward", |_| "forward_rounded");
        let launch = Launch::new(x, "layer_norm", name)?.tensor(x).of(DType::F32, w).of(DType::F32, b);
        launch.tensor(&y).rounded(rounded).int(width).int(stride).float(eps).launch(
            (rows, 1, 1),
            THREADS,
            0,
        )?;
        Ok(y)
    }

    /// Adds the gradient of `x` to the first columns of `dx`, which `rounded` gets in 8 bits.
    pub fn backward(
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f64,
        dx: &Tensor,
        rounded: Option<&Scaled>,
    ) -> Result<()> {
        let ((rows, width), (_, stride)) = (x.dims2()?, dx.dims2()?);
        assert!(width <= stride, "a gradient of {width} columns in {stride}");
        let name = rounded.map_or("backward", |_| "backward_rounded");
        let launch = Launch::new(x, "layer_norm", name)?.tensor(dy).tensor(x).of(DType::F32, w);
        launch.tensor(dx).rounded(rounded).int(width).int(stride).float(eps).launch((rows, 1, 1), THREADS, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width) in [(1, 3), (3, 7), (129, 96), (2, 1000), (1, 4096)] {
                let (x, dy) = (gpu.random((rows, width), 1)?, gpu.random((rows, width), 3)?);
                let (w, b) = (gpu.random(width, 2)?, gpu.random(width, 4)?);
                let expected = formula(&x, &w, &b, 1e-5)?;
                let put = |x: &Tensor| gpu.put_as(DType::F32, x);
                gpu.same(&forward(&gpu.put(&x)?, &put(&w)?, &put(&b)?, 1e-5)?, &expected)?;
                let beside = forward_beside(&gpu.put(&x)?, &put(&w)?, &put(&b)?, 1e-5, 64)?;
                gpu.same(&judge::first(&beside, width)?, &expected)?;
                let dx = gpu.put(&dy)?; // the gradient is added to the tensor's content
                backward(&gpu.put(&dy)?, &gpu.put(&x)?, &put(&w)?, 1e-5, &dx)?;
                gpu.same(&dx, &(judge::gradient(&x, &expected, &dy)? + dy.as_tensor())?)?;
                // Beside the gradient lie columns that stay as they are.
                let beside = gpu.random((rows, 64), 5)?;
                let wide = gpu.put(&Tensor::cat(&[dy.as_tensor(), beside.as_tensor()], 1)?)?;
                backward(&gpu.put(&dy)?, &gpu.put(&x)?, &put(&w)?, 1e-5, &wide)?;
                let same = judge::first(&wide, width)?.to_dtype(DType::F64)?;
                gpu.within(0.0, &dx, &same)?;
                gpu.within(0.0, &wide.to_device(&Device::Cpu)?.narrow(1, width, 64)?.contiguous()?, &beside)?;
            }
            Ok(())
        })
    }

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for (rows, width) in [(1, 1), (3, 7), (129, 96), (130, 100)] {
            let x = judge::random((rows, width), 1)?;
            let (w, b) = ((judge::random(width, 2)?.as_tensor() + 1.0)?, judge::random(width, 4)?);
            let dy = judge::random((rows, width), 3)?;
            let expected = formula(&x, &w, &b, 1e-5)?;
            judge::same(&forward(&x, &w, &b, 1e-5)?, &expected, 1e-12)?;
            let dx = x.ones_like()?;
            backward(&dy, &x, &w, 1e-5, &dx)?;
            // A single column has no variance: 1/s is 316, and rounding errors of a zero gradient are multiplied by
            // it.
            judge::same(&(dx - 1.0)?, &judge::gradient(&x, &expected, &dy)?, 1e-11)?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        let (x, w, b) = (judge::random((2, 5), 1)?, judge::random(5, 2)?, judge::random(5, 4)?);
        let dy = judge::random((2, 5), 3)?;
        let dx = x.zeros_like()?;
        backward(&dy, &x, &w, 1e-5, &dx)?;
        judge::finite_differences(&x, &dy, &dx, 1e-7, |x| forward(x, &w, &b, 1e-5))
    }

    /// TOLERANCE: a mean of 1024 rounds by up to 6e-5. A variance computed as a difference of squares would be off
    /// by 0.1.
    #[test]
    fn a_mean_far_from_zero_costs_no_digits() -> Result<()> {
        let x = judge::random((4, 64), 1)?;
        let (w, b) = (x.ones_like()?.narrow(0, 0, 1)?.flatten_all()?, judge::random(64, 4)?);
        let far = (x.as_tensor() + 1024.0)?.to_dtype(DType::F32)?;
        let narrow = |x: &Tensor| x.to_dtype(DType::F32);
        let expected = forward(&far.to_dtype(candle_core::DType::F64)?, &w, &b, 1e-5)?;
        judge::same(&forward(&far, &narrow(&w)?, &narrow(&b)?, 1e-5)?, &expected, 2e-4)
    }
}

//! The activation of a feed-forward: `h = f(gate) * up` from one matrix [T, 2F] that holds gate, then up, or `h =
//! f(x)`.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
#[cfg(feature = "cuda")]
use super::fp8::{self, Scaled};
use crate::facts::{Activation, Function};
use crate::with_real;

const ROWS: usize = 16;

/// Returns the definition, in differentiable primitives.
pub fn formula(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let width = activation.width(x.dim(D::Minus1)?);
    let gate = x.narrow(D::Minus1, 0, width)?;
    let h = match activation.function {
        Function::Silu => gate.silu()?,
        Function::GeluTanh => {
            let cubic = ((gate.sqr()? * 0.044715)? + 1.0)?;
            let inner = ((&gate * cubic)? * ROOT_2_OVER_PI)?;
            ((&gate * 0.5)? * (inner.tanh()? + 1.0)?)?
        }
        Function::GeluErf => ((&gate * 0.5)? * ((&gate * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?)?,
    };
    if activation.gated { h * x.narrow(D::Minus1, width, width)? } else { Ok(h) }
}

/// x [T, 2F] if gated, else [T, F] -> h [T, F].
pub fn forward(x: &Tensor, activation: Activation) -> Result<Tensor> {
    forward_beside(x, activation, 0)
}

/// Does `forward` into the first columns of [T, F + spare]; the spare columns are not written. They need a GPU.
pub fn forward_beside(x: &Tensor, activation: Activation, spare: usize) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let width = activation.width(columns);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward(x, activation, spare, None);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        let h = match activation.function {
            Function::Silu => forward_as::<T, Silu>(x, columns, width),
            Function::GeluTanh => forward_as::<T, GeluTanh>(x, columns, width),
            Function::GeluErf => forward_as::<T, GeluErf>(x, columns, width),
        };
        cpu::tensor(h, (rows, width))
    })
}

/// dh [T, F] -> the gradient of x, in x's shape.
pub fn backward(dh: &Tensor, x: &Tensor, activation: Activation) -> Result<Tensor> {
    backward_beside(dh, x, activation, 0)
}

/// Does `backward` into the first columns of a matrix with `spare` more, which are not written. They need a GPU.
pub fn backward_beside(dh: &Tensor, x: &Tensor, activation: Activation, spare: usize) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let width = activation.width(columns);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::backward(dh, x, activation, spare, false, &[]);
    }
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(x, T => {
        let (x, dh) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(dh)?);
        let d = match activation.function {
            Function::Silu => backward_as::<T, Silu>(x, dh, columns, width),
            Function::GeluTanh => backward_as::<T, GeluTanh>(x, dh, columns, width),
            Function::GeluErf => backward_as::<T, GeluErf>(x, dh, columns, width),
        };
        cpu::tensor(d, (rows, columns))
    })
}

/// Does `backward_beside` on a GPU, in the same pass over memory of which dh becomes what `forward` returns.
#[cfg(feature = "cuda")]
pub fn backward_keeping(dh: &Tensor, x: &Tensor, activation: Activation, spare: usize) -> Result<Tensor> {
    gpu::backward(dh, x, activation, spare, true, &[])
}

/// Does `forward_beside` on a GPU, and also returns the result without its spare columns in 8 bits.
#[cfg(feature = "cuda")]
pub fn forward_rounded(x: &Tensor, activation: Activation, spare: usize) -> Result<(Tensor, Scaled)> {
    let (rows, columns) = x.dims2()?;
    let rounded = fp8::empty(rows, activation.width(columns), x)?;
    Ok((gpu::forward(x, activation, spare, Some(&rounded))?, rounded))
}

/// Does `backward_beside` on a GPU, or `backward_keeping` with `keep`, and also returns the gradient without its spare
/// columns in 8 bits: as one matrix, or those of gate and of up if `parts` is 2.
#[cfg(feature = "cuda")]
pub fn backward_rounded(
    dh: &Tensor,
    x: &Tensor,
    activation: Activation,
    spare: usize,
    keep: bool,
    parts: usize,
) -> Result<(Tensor, Vec<Scaled>)> {
    let (rows, columns) = x.dims2()?;
    assert!(parts == 1 || parts == 2 && activation.gated, "{parts} parts of {activation:?}");
    let rounded = (0..parts).map(|_| fp8::empty(rows, columns / parts, x)).collect::<Result<Vec<_>>>()?;
    Ok((gpu::backward(dh, x, activation, spare, keep, &rounded)?, rounded))
}

/// A function of one number, with its derivative.
trait Curve {
    fn value<T: Real>(x: T) -> T;
    fn value_and_slope<T: Real>(x: T) -> (T, T);
}

fn forward_as<T: Real, C: Curve>(x: &[T], columns: usize, width: usize) -> Vec<T> {
    let mut h = vec![T::ZERO; x.len() / columns * width];
    h.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * columns)).for_each(|(h, x)| {
        cpu::vectorized(
            #[inline(always)]
            || {
                for (h, x) in h.chunks_mut(width).zip(x.chunks(columns)) {
                    let (gate, up) = x.split_at(width);
                    h.iter_mut().zip(gate).for_each(|(h, &gate)| *h = C::value(gate));
                    h.iter_mut().zip(up).for_each(|(h, &up)| *h *= up);
                }
            },
        )
    });
    h
}

fn backward_as<T: Real, C: Curve>(x: &[T], dh: &[T], columns: usize, width: usize) -> Vec<T> {
    let mut d = vec![T::ZERO; x.len()];
    let rows = x.par_chunks(ROWS * columns).zip(dh.par_chunks(ROWS * width));
    d.par_chunks_mut(ROWS * columns).zip(rows).for_each(|(d, (x, dh))| {
        cpu::vectorized(
            #[inline(always)]
            || {
                for ((d, x), dh) in d.chunks_mut(columns).zip(x.chunks(columns)).zip(dh.chunks(width)) {
                    match columns == width {
                        true => plain_row::<T, C>(d, x, dh),
                        false => gated_row::<T, C>(d, x, dh),
                    }
                }
            },
        )
    });
    d
}

#[inline(always)]
fn plain_row<T: Real, C: Curve>(d: &mut [T], x: &[T], dh: &[T]) {
    for ((d, &x), &dh) in d.iter_mut().zip(x).zip(dh) {
        *d = dh * C::value_and_slope(x).1;
    }
}

#[inline(always)]
fn gated_row<T: Real, C: Curve>(d: &mut [T], x: &[T], dh: &[T]) {
    let (gate, up) = x.split_at(dh.len());
    let (d_gate, d_up) = d.split_at_mut(dh.len());
    for ((((d_gate, d_up), &gate), &up), &dh) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dh) {
        let (value, slope) = C::value_and_slope(gate);
        *d_gate = dh * up * slope;
        *d_up = dh * value;
    }
}

struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        x * sigmoid(x)
    }
    /// s * (1 + x * (1 - s)), with s = sigmoid(x).
    #[inline(always)]
    fn value_and_slope<T: Real>(x: T) -> (T, T) {
        let s = sigmoid(x);
        (x * s, s * (T::ONE + x * (T::ONE - s)))
    }
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + Real::exp(-x))
}

const ROOT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

struct GeluTanh;

impl GeluTanh {
    #[inline(always)]
    fn tanh<T: Real>(x: T) -> T {
        Real::tanh(T::of(ROOT_2_OVER_PI) * x * (T::of(0.044715) * x).fma(x, T::ONE))
    }
}

impl Curve for GeluTanh {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        T::of(0.5) * x * (T::ONE + GeluTanh::tanh(x))
    }
    /// (1 + t) / 2 + x / 2 * (1 - t^2) * sqrt(2/pi) * (1 + 3 * 0.044715 x^2)
    #[inline(always)]
    fn value_and_slope<T: Real>(x: T) -> (T, T) {
        let t = GeluTanh::tanh(x);
        let half = T::of(0.5) * (T::ONE + t);
        let inner = T::of(ROOT_2_OVER_PI) * (T::of(3.0 * 0.044715) * x).fma(x, T::ONE);
        (x * half, half + T::of(0.5) * x * (T::ONE - t * t) * inner)
    }
}

struct GeluErf;

impl Curve for GeluErf {
    #[inline(always)]
    fn value<T: Real>(x: T) -> T {
        T::of(0.5) * x * (T::ONE + Real::erf(x * T::of(std::f64::consts::FRAC_1_SQRT_2)))
    }
    /// P(x) + x p(x), with the normal distribution P and its density p.
    #[inline(always)]
    fn value_and_slope<T: Real>(x: T) -> (T, T) {
        const ROOT_TAU: f64 = 2.506_628_274_631_000_5;
        let half = T::of(0.5) * (T::ONE + Real::erf(x * T::of(std::f64::consts::FRAC_1_SQRT_2)));
        let density = Real::exp(T::of(-0.5) * x * x) * T::of(1.0 / ROOT_TAU);
        (x * half, half + x * density)
    }
}

/// The launches of `kernels/activation.cu`: one block per row.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::DType;

    use super::*;
    use crate::ops::cuda::Launch;

    const THREADS: usize = 256;

    /// Returns the kernels of the forward and of the backward pass.
    fn curve(activation: Activation, rounded: bool) -> (&'static str, &'static str) {
        match (activation.function, rounded) {
            (Function::Silu, false) => ("forward_silu", "backward_silu"),
            (Function::GeluTanh, false) => ("forward_gelu_tanh", "backward_gelu_tanh"),
            (Function::GeluErf, false) => ("forward_gelu_erf", "backward_gelu_erf"),
            (Function::Silu, true) => ("forward_rounded_silu", "backward_rounded_silu"),
            (Function::GeluTanh, true) => ("forward_rounded_gelu_tanh", "backward_rounded_gelu_tanh"),
            (Function::GeluErf, true) => ("forward_rounded_gelu_erf", "backward_rounded_gelu_erf"),
        }
    }

    /// The activation of `x` [rows, columns] -> [rows, width], on the GPU. `rounded` gets it in 8 bits.
    pub fn forward(
        x: &Tensor,
        activation: Activation,
        spare: usize,
        rounded: Option<&Scaled>,
    ) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        let width = activation.width(columns);
        let h = crate::ops::unwritten((rows, width + spare), x.dtype(), x.device())?;
        let launch = Launch::new(x, "activation", curve(activation, rounded.is_some()).0)?;
        let launch = launch.tensor(x).tensor(&h).rounded(rounded);
        let launch = launch.int(width).int(width + spare).int(usize::from(activation.gated));
        launch.launch((rows, 1, 1), THREADS, 0)?;
        Ok(h)
    }

    /// Returns the gradient of `x`, with spare columns behind it, from that of the result. With `keep`, the result
    /// takes the place of its gradient. `rounded` gets the gradient in 8 bits, as one matrix or as two; `&[]`: nothing
    /// does.
    pub fn backward(
        dh: &Tensor,
        x: &Tensor,
        activation: Activation,
        spare: usize,
        keep: bool,
        rounded: &[Scaled],
    ) -> Result<Tensor> {
        let ((rows, width), stride) = (dh.dims2()?, x.dim(1)? + spare);
        let d = crate::ops::unwritten((rows, stride), x.dtype(), x.device())?;
        let launch = Launch::new(x, "activation", curve(activation, !rounded.is_empty()).1)?;
        let launch = launch.tensor(dh).tensor(x).tensor(&d);
        let launch = match rounded {
            [] => launch,
            [whole] => launch.rounded(Some(whole)).optional(DType::U8, None).optional(DType::F32, None),
            [gate, up, ..] => launch.rounded(Some(gate)).rounded(Some(up)),
        };
        let launch = launch.int(width).int(stride);
        let launch = launch.int(usize::from(activation.gated)).int(usize::from(keep));
        launch.launch((rows, 1, 1), THREADS, 0)?;
        Ok(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for activation in all() {
                for (rows, width) in [(1, 1), (5, 7), (3, 96), (2, 2100)] {
                    let columns = if activation.gated { 2 * width } else { width };
                    let (x, dh) = (gpu.random((rows, columns), 1)?, gpu.random((rows, width), 2)?);
                    let (expected, on_gpu) = (formula(&x, activation)?, gpu.put(&x)?);
                    gpu.same(&forward(&on_gpu, activation)?, &expected)?;
                    let beside = forward_beside(&on_gpu, activation, 64)?;
                    gpu.same(&judge::first(&beside, width)?, &expected)?;
                    let gradient = judge::gradient(&x, &expected, &dh)?;
                    gpu.same(&backward(&gpu.put(&dh)?, &on_gpu, activation)?, &gradient)?;
                    let beside = backward_beside(&gpu.put(&dh)?, &on_gpu, activation, 64)?;
                    gpu.same(&judge::first(&beside, columns)?, &gradient)?;
                    kept_in_its_gradients_place(gpu, &on_gpu, &dh, activation)?;
                }
            }
            Ok(())
        })
    }

    /// Expects the bits of two passes from one pass.
    #[cfg(feature = "cuda")]
    fn kept_in_its_gradients_place(
        gpu: &judge::Gpu,
        x: &Tensor,
        dh: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        let host = |tensor: Tensor| tensor.to_device(&candle_core::Device::Cpu);
        let place = gpu.put(dh)?;
        let expected = host(backward(&place, x, activation)?)?;
        gpu.within(0.0, &backward_keeping(&place, x, activation, 0)?, &expected)?;
        gpu.within(0.0, &place, &host(forward(x, activation)?)?)
    }

    #[cfg(not(feature = "cuda"))]
    fn kept_in_its_gradients_place(_: &judge::Gpu, _: &Tensor, _: &Tensor, _: Activation) -> Result<()> {
        Ok(())
    }

    fn all() -> impl Iterator<Item = Activation> {
        let functions = [Function::Silu, Function::GeluTanh, Function::GeluErf];
        functions.into_iter().flat_map(|function| [true, false].map(|gated| Activation { function, gated }))
    }

    #[test]
    fn value_and_gradient_equal_the_formula() -> Result<()> {
        for activation in all() {
            for (rows, width) in [(1, 1), (3, 7), (37, 66)] {
                let columns = if activation.gated { 2 * width } else { width };
                let (x, dh) = (judge::random((rows, columns), 1)?, judge::random((rows, width), 2)?);
                let expected = formula(&x, activation)?;
                judge::same(&forward(&x, activation)?, &expected, 1e-12)?;
                let gradient = judge::gradient(&x, &expected, &dh)?;
                judge::same(&backward(&dh, &x, activation)?, &gradient, 1e-12)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_finite_differences() -> Result<()> {
        for activation in all() {
            let (x, dh) = (judge::random((2, 6), 1)?, judge::random((2, activation.width(6)), 2)?);
            let d = backward(&dh, &x, activation)?;
            judge::finite_differences(&x, &dh, &d, 1e-7, |x| forward(x, activation))?;
        }
        Ok(())
    }

    /// TOLERANCE: torch's own f32 functions are as far from the true values.
    #[test]
    fn f32_equals_f64_over_the_whole_range() -> Result<()> {
        let x: Vec<f64> = (-4000..4000).map(|i| i as f64 * 0.01).collect();
        let x = Tensor::from_vec(x, (8, 1000), &candle_core::Device::Cpu)?;
        let narrow = x.to_dtype(candle_core::DType::F32)?;
        let x = narrow.to_dtype(candle_core::DType::F64)?;
        for activation in all().filter(|activation| !activation.gated) {
            judge::same(&forward(&narrow, activation)?, &forward(&x, activation)?, 1e-6)?;
            let ones = (narrow.ones_like()?, x.ones_like()?);
            let slope = backward(&ones.1, &x, activation)?;
            judge::same(&backward(&ones.0, &narrow, activation)?, &slope, 1e-6)?;
        }
        Ok(())
    }
}

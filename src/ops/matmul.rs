//! Matrix products of activations with weights [N, K], dense or 4-bit: forward and both gradients. On a CPU,
//! `ops/gemm` packs its operands from the stored form, so a frozen 4-bit weight is never expanded in memory. On a
//! GPU, cuBLAS multiplies, and a 4-bit weight is expanded for the length of one product. `Precision` applies to the
//! CPU only: products on a GPU have the activations' type, with sums in f32.

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

use super::cpu::{self, Real, View};
use super::four_bit::FourBit;
use crate::with_real;

use crate::facts::Precision;

/// A weight [N, K] of a linear layer `y = x W^T`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32 or bf16 (f64 in tests).
    Dense(Tensor),
    /// 4-bit blocks with scales.
    FourBit(FourBit),
}

impl Weight {
    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Weight::Dense(tensor) => (tensor.dims()[0], tensor.dims()[1]),
            Weight::FourBit(weight) => (weight.rows, weight.cols),
        }
    }

    /// Bytes that the weight takes.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Weight::FourBit(weight) => weight.bytes(),
        }
    }
}

/// A matrix in its stored form.
#[derive(Clone, Copy)]
pub enum Operand<'a, T> {
    /// Values of the type that the product computes in.
    View(View<'a, T>),
    /// Values in bf16.
    Bf16(View<'a, bf16>),
    /// A 4-bit weight.
    FourBit {
        /// The weight.
        weight: &'a FourBit,
        /// Its indices, two per byte.
        packed: &'a [u8],
        /// The scale of each block.
        scales: &'a [f32],
        /// Whether the operand is W^T [K, N].
        transposed: bool,
    },
}

/// `y[:, at..at+N] = alpha * x W^T + beta * y[:, at..at+N]`: x [T, K], y [T, at+N or wider].
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    alpha: f64,
    y: &Tensor,
    at: usize,
    beta: f64,
    precision: Precision,
) -> Result<()> {
    let ((n, k), (rows, x_width), (y_rows, y_width)) = (weight.dims(), x.dims2()?, y.dims2()?);
    assert!(
        x_width == k && y_rows == rows && at + n <= y_width,
        "{rows}x{x_width} by {n}x{k} into {y_width}"
    );
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward(x, weight, alpha, y, at, beta);
    }
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        with_operand::<T, _>(weight, true, |w| {
            let x = Operand::View(View::rows(x, k));
            let product = |y: &mut [T]| {
                T::product([rows, n, k], T::of(alpha), x, w, T::of(beta), &mut y[at..], y_width, precision)
            };
            cpu::edit(y, product)
        })?
    })
}

/// `forward` in which a row's bits depend on that row alone, whatever the number of rows. It is for rows of
/// sequences that must not influence each other. CPU only.
pub fn forward_apart(
    x: &Tensor,
    weight: &Weight,
    alpha: f64,
    y: &Tensor,
    at: usize,
    beta: f64,
    precision: Precision,
) -> Result<()> {
    let ((n, k), (rows, x_width), (y_rows, y_width)) = (weight.dims(), x.dims2()?, y.dims2()?);
    assert!(
        x_width == k && y_rows == rows && at + n <= y_width,
        "{rows}x{x_width} by {n}x{k} into {y_width}"
    );
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        with_operand::<T, _>(weight, true, |w| {
            let x = Operand::View(View::rows(x, k));
            let product = |y: &mut [T]| {
                T::product_apart([rows, n, k], T::of(alpha), x, w, T::of(beta), &mut y[at..], y_width, precision)
            };
            cpu::edit(y, product)
        })?
    })
}

/// `dx = alpha * dy[:, at..at+N] W + beta * dx`: dy [T, at+N or wider], dx [T, K].
pub fn input_gradient(
    dy: &Tensor,
    at: usize,
    weight: &Weight,
    alpha: f64,
    dx: &Tensor,
    beta: f64,
    precision: Precision,
) -> Result<()> {
    let ((n, k), (rows, dy_width), (dx_rows, dx_width)) = (weight.dims(), dy.dims2()?, dx.dims2()?);
    assert!(
        dx_width == k && dx_rows == rows && at + n <= dy_width,
        "{rows}x{dy_width} by {n}x{k} into {dx_width}"
    );
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return gpu::input_gradient(dy, at, weight, alpha, dx, beta);
    }
    with_real!(dy, T => {
        let dy = &*cpu::read::<T>(dy)?;
        with_operand::<T, _>(weight, false, |w| {
            let dy = Operand::View(View::rows(&dy[at..], dy_width));
            let product =
                |dx: &mut [T]| T::product([rows, k, n], T::of(alpha), dy, w, T::of(beta), dx, k, precision);
            cpu::edit(dx, product)
        })?
    })
}

/// `gradient += alpha * dy[:, at..at+N]^T x`: dy [T, at+N or wider], x [T, K], gradient [N, K].
pub fn weight_gradient(
    dy: &Tensor,
    at: usize,
    x: &Tensor,
    alpha: f64,
    gradient: &Tensor,
    precision: Precision,
) -> Result<()> {
    let ((n, k), (rows, dy_width), (x_rows, x_width)) = (gradient.dims2()?, dy.dims2()?, x.dims2()?);
    assert!(
        x_width == k && x_rows == rows && at + n <= dy_width,
        "{n}x{k} from {rows}x{dy_width}, {x_width}"
    );
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::weight_gradient(dy, at, x, alpha, gradient);
    }
    with_real!(x, T => {
        let (x, dy) = (&*cpu::read::<T>(x)?, &*cpu::read::<T>(dy)?);
        let dy = Operand::View(View::rows(&dy[at..], dy_width).transposed());
        let x = Operand::View(View::rows(x, k));
        let product = |g: &mut [T]| T::product([n, k, rows], T::of(alpha), dy, x, T::ONE, g, k, precision);
        cpu::edit(gradient, product)
    })
}

/// Passes the weight to `body` as the right-hand operand: W^T [K, N] if `transposed`, else W [N, K].
fn with_operand<T: Real, R>(
    weight: &Weight,
    transposed: bool,
    body: impl FnOnce(Operand<T>) -> R,
) -> Result<R> {
    let (_, k) = weight.dims();
    match weight {
        Weight::FourBit(weight) => {
            let scales = weight.scales()?;
            let packed = &*cpu::read::<u8>(&weight.packed)?;
            Ok(body(Operand::FourBit { weight, packed, scales: &scales, transposed }))
        }
        Weight::Dense(tensor) if tensor.dtype() == DType::BF16 => {
            let data = &*cpu::read::<bf16>(tensor)?;
            let view = View::rows(data, k);
            Ok(body(Operand::Bf16(if transposed { view.transposed() } else { view })))
        }
        Weight::Dense(tensor) if tensor.dtype() == T::DTYPE => {
            let data = &*cpu::read::<T>(tensor)?;
            let view = View::rows(data, k);
            Ok(body(Operand::View(if transposed { view.transposed() } else { view })))
        }
        Weight::Dense(tensor) => bail!("a weight in {:?} for {:?} activations", tensor.dtype(), T::DTYPE),
    }
}

impl<T: Real> Operand<'_, T> {
    /// All values of the operand, [rows, cols] as it takes part in the product. For tests in f64.
    pub fn expand(&self, rows: usize, cols: usize) -> Vec<T> {
        let fill = |at: &dyn Fn(usize, usize) -> T| {
            (0..rows * cols).map(|i| at(i / cols, i % cols)).collect::<Vec<T>>()
        };
        match self {
            Operand::View(view) => fill(&|i, j| view.data[i * view.row + j * view.col]),
            Operand::Bf16(view) => fill(&|i, j| T::of(view.data[i * view.row + j * view.col].to_f64())),
            Operand::FourBit { weight, packed, scales, transposed } => fill(&|i, j| {
                let flat = if *transposed { j * weight.cols + i } else { i * weight.cols + j };
                let index = if flat % 2 == 0 { packed[flat / 2] >> 4 } else { packed[flat / 2] & 15 };
                T::of((weight.code.values()[index as usize] * scales[flat / weight.block]) as f64)
            }),
        }
    }
}

/// Products on a GPU by cuBLAS, through `ops/cuda`.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::product::{Matrix, product};
    use crate::ops::rows;

    pub fn forward(x: &Tensor, weight: &Weight, alpha: f64, y: &Tensor, at: usize, beta: f64) -> Result<()> {
        let ((n, k), (rows, _), (_, width)) = (weight.dims(), x.dims2()?, y.dims2()?);
        let w = expand(weight, x.dtype())?;
        let (x, w) = (Matrix::rows(x, 0, k), Matrix::rows(&w, 0, k).transposed());
        product([rows, n, k], alpha, x, w, beta, Matrix::rows(y, at, width))
    }

    pub fn input_gradient(
        dy: &Tensor,
        at: usize,
        weight: &Weight,
        alpha: f64,
        dx: &Tensor,
        beta: f64,
    ) -> Result<()> {
        let ((n, k), (rows, width)) = (weight.dims(), dy.dims2()?);
        let w = expand(weight, dy.dtype())?;
        let (dy, w) = (Matrix::rows(dy, at, width), Matrix::rows(&w, 0, k));
        product([rows, k, n], alpha, dy, w, beta, Matrix::rows(dx, 0, k))
    }

    /// The gradient may be f32 while x and dy are bf16; its sums are then never rounded to bf16.
    pub fn weight_gradient(dy: &Tensor, at: usize, x: &Tensor, alpha: f64, gradient: &Tensor) -> Result<()> {
        let ((n, k), (rows, width)) = (gradient.dims2()?, dy.dims2()?);
        let (dy, x) = (Matrix::rows(dy, at, width).transposed(), Matrix::rows(x, 0, k));
        product([n, k, rows], alpha, dy, x, 1.0, Matrix::rows(gradient, 0, k))
    }

    /// All values in the activations' type. A tensor that is made here lives for one product: it is freed in stream
    /// order, and the next layer's weight takes its place.
    fn expand(weight: &Weight, dtype: DType) -> Result<Tensor> {
        match weight {
            Weight::Dense(tensor) => rows::convert(tensor, dtype),
            Weight::FourBit(weight) => weight.dequantize_on_gpu(dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::judge::{self, Gpu};
    use candle_core::Device;

    /// Columns of the output before and after the range that a product writes.
    const BEFORE: usize = 3;
    const BEHIND: usize = 2;

    #[test]
    fn products_on_a_gpu_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, n, k) in [(1, 1, 1), (5, 7, 9), (33, 40, 64), (16, 96, 128)] {
                let values = gpu.random((n, k), 1)?;
                for weight in kinds(gpu, &values)? {
                    check(gpu, rows, &weight)?;
                }
            }
            Ok(())
        })
    }

    /// A weight in every form of storage, on the GPU.
    fn kinds(gpu: &Gpu, values: &Tensor) -> Result<Vec<Weight>> {
        let (n, k) = values.dims2()?;
        let floats = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut kinds = vec![
            Weight::Dense(gpu.put_as(DType::F32, values)?),
            Weight::Dense(gpu.put_as(DType::BF16, values)?),
        ];
        for (code, double) in [(Code::Nf4, true), (Code::Fp4, false)] {
            let weight = FourBit::quantize(&floats, n, k, code, double)?;
            kinds.push(Weight::FourBit(weight.to_device(&gpu.device)?));
        }
        Ok(kinds)
    }

    /// The values that take part in a product: rounded to the activations' type.
    fn values(gpu: &Gpu, weight: &Weight) -> Result<Tensor> {
        let values = match weight {
            Weight::Dense(tensor) => tensor.to_device(&Device::Cpu)?,
            Weight::FourBit(stored) => {
                let host = stored.to_device(&Device::Cpu)?;
                Tensor::from_vec(host.dequantize()?, weight.dims(), &Device::Cpu)?
            }
        };
        values.to_dtype(gpu.dtype)?.to_dtype(DType::F64)
    }

    fn check(gpu: &Gpu, rows: usize, weight: &Weight) -> Result<()> {
        let ((n, k), w) = (weight.dims(), values(gpu, weight)?);
        let width = BEFORE + n + BEHIND;
        let (x, y) = (gpu.random((rows, k), 2)?, gpu.random((rows, width), 3)?);
        let (x, y) = (x.as_tensor(), y.as_tensor());
        let columns = |y: &Tensor| y.narrow(1, BEFORE, n)?.contiguous();
        for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0)] {
            let found = gpu.put(y)?;
            forward(&gpu.put(x)?, weight, alpha, &found, BEFORE, beta, Precision::F32)?;
            let part = ((x.matmul(&w.t()?)? * alpha)? + (columns(y)? * beta)?)?;
            let around = (y.narrow(1, 0, BEFORE)?, y.narrow(1, BEFORE + n, BEHIND)?);
            gpu.same(&found, &Tensor::cat(&[&around.0, &part, &around.1], 1)?)?;
            let found = gpu.put(x)?;
            input_gradient(&gpu.put(y)?, BEFORE, weight, alpha, &found, beta, Precision::F32)?;
            gpu.same(&found, &((columns(y)?.matmul(&w)? * alpha)? + (x * beta)?)?)?;
        }
        let start = gpu.random((n, k), 4)?;
        for dtype in [gpu.dtype, DType::F32] {
            let found = gpu.put_as(dtype, &start)?;
            weight_gradient(&gpu.put(y)?, BEFORE, &gpu.put(x)?, 0.25, &found, Precision::F32)?;
            gpu.same(&found, &((columns(y)?.t()?.matmul(x)? * 0.25)? + start.as_tensor())?)?;
        }
        Ok(())
    }
}

//! DoRA's magnitudes (Liu and others 2024), as PEFT computes them: `y = m / |W + s B A| * (x W^T + s x A^T B^T)`.
//! The length of each row of `W + s B A` is a constant for the gradient.
//!
//! The lengths need no expanded weight: the square of one is `|W_j|^2 + s B_j (2 A W_j^T + s A A^T B_j^T)`. The first
//! term never changes, and the second is a product of W with the r rows of A, which costs as much as r more tokens.

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::four_bit::FourBit;
use super::matmul::{self, Weight};
use super::unwritten;
use crate::facts::Precision;
use crate::with_real;

/// The factor of columns: `strength * (magnitude * inverse - shift)`.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    /// The magnitudes `[N]`: f32, or f64 in tests.
    pub magnitude: &'a Tensor,
    /// `inverse` of the lengths `[N]`.
    pub inverse: &'a Tensor,
    /// 1 if the result is DoRA's addition to a product that is already there; else 0.
    pub shift: f64,
    /// A factor on everything.
    pub strength: f64,
}

/// Columns `at..` of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// The matrix.
    pub of: &'a Tensor,
    /// The first column.
    pub at: usize,
}

/// Returns squares of the lengths of a weight's rows, `[N]`, for activations of type `dtype`.
pub fn squares(weight: &Weight, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gpu::lies_there(weight) {
        return gpu::squares(weight, dtype);
    }
    let sums = match weight {
        Weight::FourBit(weight) => four_bit_squares(weight)?,
        Weight::Dense(tensor) if tensor.dtype() == DType::BF16 => {
            let values = &*cpu::read::<bf16>(tensor)?;
            row_squares(values, tensor.dims2()?.1, |value| value.to_f64())
        }
        Weight::Dense(tensor) => with_real!(tensor, T => {
            let values = &*cpu::read::<T>(tensor)?;
            row_squares(values, tensor.dims2()?.1, |value: T| value.wide())
        }),
    };
    let count = sums.len();
    cpu::tensor(sums, count)?.to_dtype(if dtype == DType::F64 { DType::F64 } else { DType::F32 })
}

fn row_squares<T: Copy + Sync>(values: &[T], cols: usize, wide: impl Fn(T) -> f64 + Sync) -> Vec<f64> {
    let row = |row: &[T]| row.iter().map(|value| wide(*value).powi(2)).sum();
    values.par_chunks(cols).map(row).collect()
}

fn four_bit_squares(weight: &FourBit) -> Result<Vec<f64>> {
    let (scales, packed) = (weight.scales()?, &*cpu::read::<u8>(&weight.packed)?);
    let values = weight.code.values();
    let square = |at: usize| {
        let index = if at.is_multiple_of(2) { packed[at / 2] >> 4 } else { packed[at / 2] & 15 };
        f64::from(values[index as usize] * scales[at / weight.block]).powi(2)
    };
    let row = |row: usize| (row * weight.cols..(row + 1) * weight.cols).map(square).sum();
    Ok((0..weight.rows).into_par_iter().map(row).collect())
}

/// Returns 1 / the lengths of the rows of `W + scale * B A`, `[N]`; 0 for a row of zeros. `squares` is that of W.
pub fn inverse(weight: &Weight, squares: &Tensor, a: &Weight, b: &Weight, scale: f64) -> Result<Tensor> {
    let (Weight::Dense(a_values), Weight::Dense(b_values)) = (a, b) else {
        bail!("an adapter's matrix in 4 bits");
    };
    let ((rank, _), (n, _)) = (a.dims(), b.dims());
    let (device, precision) = (squares.device(), Precision::F32);
    let q = unwritten((rank, n), squares.dtype(), device)?; // 2 A W^T + scale * A A^T B^T
    matmul::forward(a_values, weight, 2.0, &q, 0, 0.0, precision)?;
    let gram = unwritten((rank, rank), a_values.dtype(), device)?;
    matmul::forward(a_values, a, 1.0, &gram, 0, 0.0, precision)?;
    matmul::forward(&gram, b, scale, &q, 0, 1.0, precision)?;
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return gpu::inverse(squares, b_values, &q, scale);
    }
    with_real!(squares, T => {
        let (squares, b, q) = (&*cpu::read::<T>(squares)?, &*cpu::read::<T>(b_values)?, &*cpu::read::<T>(&q)?);
        let one = |i: usize| {
            let sum: f64 = (0..rank).map(|r| b[i * rank + r].wide() * q[r * n + i].wide()).sum();
            let square = squares[i].wide() + scale * sum;
            T::of(if square > 0.0 { square.sqrt().recip() } else { 0.0 })
        };
        cpu::tensor((0..n).map(one).collect::<Vec<T>>(), n)
    })
}

/// Writes `factor * from` to the columns of `to`, or adds it: as many columns as there are magnitudes.
pub fn scale(from: Columns, to: Columns, add: bool, factor: Factor) -> Result<()> {
    let (n, (rows, from_width), (to_rows, to_width)) =
        (factor.magnitude.dims1()?, from.of.dims2()?, to.of.dims2()?);
    assert!(
        rows == to_rows && from.at + n <= from_width && to.at + n <= to_width,
        "{n} columns of {rows}x{from_width} at {} into {to_rows}x{to_width} at {}",
        from.at,
        to.at
    );
    #[cfg(feature = "cuda")]
    if to.of.device().is_cuda() {
        return gpu::scale(from, to, add, factor);
    }
    with_real!(to.of, T => {
        let factors = factors::<T>(factor)?;
        let values = &*cpu::read::<T>(from.of)?;
        cpu::edit(to.of, |y: &mut [T]| {
            y.par_chunks_mut(to_width).zip(values.par_chunks(from_width)).with_min_len(64).for_each(|(y, x)| {
                let (y, x) = (&mut y[to.at..to.at + n], &x[from.at..from.at + n]);
                for ((y, &x), &factor) in y.iter_mut().zip(x).zip(&factors) {
                    *y = if add { *y + factor * x } else { factor * x };
                }
            })
        })
    })
}

fn factors<T: Real>(factor: Factor) -> Result<Vec<T>> {
    let magnitude = &*cpu::read::<T>(factor.magnitude)?;
    let inverse = &*cpu::read::<T>(factor.inverse)?;
    let one = |(m, i): (&T, &T)| T::of(factor.strength * (m.wide() * i.wide() - factor.shift));
    Ok(magnitude.iter().zip(inverse).map(one).collect())
}

/// `gradient += inverse * (sum over rows of dy * z)`: z [T, N] is the product that the magnitudes scale.
pub fn gradient(dy: Columns, z: &Tensor, inverse: &Tensor, gradient: &Tensor) -> Result<()> {
    let (n, (rows, width), (z_rows, z_width)) = (gradient.dims1()?, dy.of.dims2()?, z.dims2()?);
    assert!(
        rows == z_rows && z_width == n && dy.at + n <= width,
        "{n} of {rows}x{width}, {z_rows}x{z_width}"
    );
    #[cfg(feature = "cuda")]
    if z.device().is_cuda() {
        return gpu::gradient(dy, z, inverse, gradient);
    }
    with_real!(z, T => {
        let (dy_values, z, inverse) =
            (&*cpu::read::<T>(dy.of)?, &*cpu::read::<T>(z)?, &*cpu::read::<T>(inverse)?);
        cpu::edit(gradient, |gradient: &mut [T]| {
            gradient.par_chunks_mut(PART).enumerate().for_each(|(part, gradient)| {
                let (from, mut sums) = (part * PART, [0f64; PART]);
                for row in 0..rows {
                    let dy = &dy_values[row * width + dy.at + from..][..gradient.len()];
                    let z = &z[row * n + from..][..gradient.len()];
                    dy.iter().zip(z).zip(&mut sums).for_each(|((dy, z), sum)| *sum += dy.wide() * z.wide());
                }
                for (i, gradient) in gradient.iter_mut().enumerate() {
                    *gradient = T::of(gradient.wide() + inverse[from + i].wide() * sums[i]);
                }
            })
        })
    })
}

/// Columns that a task of the gradient sums on a CPU.
const PART: usize = 64;

/// The launches of `kernels/magnitude.cu`.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::Launch;
    use crate::ops::rows;

    /// Returns whether the weight lies on a GPU.
    pub fn lies_there(weight: &Weight) -> bool {
        match weight {
            Weight::Dense(tensor) => tensor.device().is_cuda(),
            Weight::FourBit(weight) => weight.packed.device().is_cuda(),
        }
    }

    /// Computes the squares with one block for each row of the weight, in the type in which products read it.
    pub fn squares(weight: &Weight, dtype: DType) -> Result<Tensor> {
        let values = match weight {
            Weight::Dense(tensor) => rows::convert(tensor, dtype)?,
            Weight::FourBit(weight) => weight.dequantize_on_gpu(dtype)?,
        };
        let (n, width) = weight.dims();
        let to = unwritten(n, DType::F32, values.device())?;
        let launch = Launch::new(&values, "magnitude", "squares")?.tensor(&values).of(DType::F32, &to);
        launch.int(width).launch((n, 1, 1), 256, 0)?;
        Ok(to)
    }

    /// Computes 1 / the lengths with one thread for each row of B.
    pub fn inverse(squares: &Tensor, b: &Tensor, q: &Tensor, scale: f64) -> Result<Tensor> {
        let (n, rank) = b.dims2()?;
        let to = unwritten(n, DType::F32, b.device())?;
        let launch = Launch::new(b, "magnitude", "inverse")?.of(DType::F32, squares).anywhere(b.dtype(), b);
        let launch = launch.of(DType::F32, q).of(DType::F32, &to).int(n).int(rank).float(scale);
        launch.launch((n.div_ceil(256), 1, 1), 256, 0)?;
        Ok(to)
    }

    /// Scales columns with one block for each row.
    pub fn scale(from: Columns, to: Columns, add: bool, factor: Factor) -> Result<()> {
        let (n, (rows, from_width), (_, to_width)) =
            (factor.magnitude.dims1()?, from.of.dims2()?, to.of.dims2()?);
        let launch = Launch::new(to.of, "magnitude", "scale")?
            .anywhere(DType::F32, factor.magnitude)
            .of(DType::F32, factor.inverse);
        let launch = launch.anywhere(to.of.dtype(), from.of).anywhere(to.of.dtype(), to.of).int(n);
        let launch = launch.int(from_width).int(from.at).int(to_width).int(to.at).int(usize::from(add));
        launch.float(factor.shift).float(factor.strength).launch((rows, 1, 1), 256, 0)
    }

    /// Computes the gradient with one block for 32 columns.
    pub fn gradient(dy: Columns, z: &Tensor, inverse: &Tensor, gradient: &Tensor) -> Result<()> {
        let (rows, n) = z.dims2()?;
        let launch = Launch::new(z, "magnitude", "gradient")?.tensor(dy.of).tensor(z).of(DType::F32, inverse);
        let launch = launch.anywhere(DType::F32, gradient).int(rows).int(n).int(dy.of.dims2()?.1).int(dy.at);
        launch.launch((n.div_ceil(32), 1, 1), 1024, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::judge;
    use candle_core::Device;

    /// `W + scale * B A` and the inverses of its rows' lengths, as they are written.
    fn lengths(w: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        let whole = (w + (b.matmul(a)? * scale)?)?;
        whole.sqr()?.sum(1)?.sqrt()?.recip()
    }

    fn weights(values: &Tensor) -> Result<[Weight; 2]> {
        let (n, k) = values.dims2()?;
        let flat = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let four_bit = FourBit::quantize(&flat, n, k, Code::Nf4, true)?;
        Ok([Weight::Dense(values.clone()), Weight::FourBit(four_bit)])
    }

    fn values_of(weight: &Weight) -> Result<Tensor> {
        match weight {
            Weight::Dense(tensor) => tensor.to_dtype(DType::F64),
            Weight::FourBit(weight) => {
                let values =
                    Tensor::from_vec(weight.dequantize()?, (weight.rows, weight.cols), &Device::Cpu)?;
                values.to_dtype(DType::F64)
            }
        }
    }

    #[test]
    fn lengths_come_from_terms_that_need_no_expanded_weight() -> Result<()> {
        for (rank, n, k) in [(1, 1, 1), (3, 7, 9), (16, 40, 96)] {
            let (a, b) = (judge::random((rank, k), 2)?, judge::random((n, rank), 3)?);
            for weight in weights(judge::random((n, k), 1)?.as_tensor())? {
                let (a, b) = (a.as_tensor().detach(), b.as_tensor().detach());
                let expected = lengths(&values_of(&weight)?, &a, &b, 0.7)?;
                let squares = squares(&weight, DType::F64)?;
                let found = inverse(&weight, &squares, &Weight::Dense(a), &Weight::Dense(b), 0.7)?;
                judge::same(&found, &expected, 1e-9)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_row_of_zeros_has_the_inverse_0() -> Result<()> {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let weight = Weight::Dense(zeros((2, 3))?);
        let (a, b) = (Weight::Dense(zeros((1, 3))?), Weight::Dense(zeros((2, 1))?));
        let found = inverse(&weight, &squares(&weight, DType::F32)?, &a, &b, 1.0)?;
        assert_eq!(found.to_vec1::<f32>()?, [0.0, 0.0]);
        Ok(())
    }

    /// The gradient is autograd's of the formula.
    #[test]
    fn the_gradient_is_that_of_the_formula() -> Result<()> {
        let (rows, n, at, width) = (5, 70, 2, 75);
        let (magnitude, inverse) = (judge::random(n, 1)?, judge::random(n, 2)?);
        let (z, dy) = (judge::random((rows, n), 3)?, judge::random((rows, width), 4)?);
        let y = z.broadcast_mul(&(magnitude.as_tensor() * inverse.as_tensor().detach())?)?;
        let expected = judge::gradient(&magnitude, &y, &dy.narrow(1, at, n)?)?;
        let found = Tensor::zeros(n, DType::F64, &Device::Cpu)?;
        gradient(Columns { of: &dy, at }, &z, &inverse, &found)?;
        judge::same(&found, &expected, 1e-12)
    }

    #[test]
    fn the_kernels_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, rank, n, k, at, width) in
                [(1, 1, 1, 1, 0, 1), (5, 3, 7, 9, 3, 11), (37, 8, 64, 96, 8, 80)]
            {
                let (w, a) = (gpu.random((n, k), 1)?, gpu.random((rank, k), 2)?);
                let b = gpu.random((n, rank), 3)?;
                let weight = Weight::Dense(gpu.put(&w)?);
                let squares = squares(&weight, gpu.dtype)?;
                gpu.same(&squares, &w.sqr()?.sum(1)?)?;
                let (a_there, b_there) = (Weight::Dense(gpu.put(&a)?), Weight::Dense(gpu.put(&b)?));
                let inverse = inverse(&weight, &squares, &a_there, &b_there, 0.3)?;
                gpu.same(&inverse, &lengths(&w, &a, &b, 0.3)?)?;
                let flat = gpu.put_as(DType::F32, judge::random(n + 1, 4)?.as_tensor())?;
                let magnitude = flat.narrow(0, 1, n)?; // not on a multiple of 16 bytes
                let (z, y) = (gpu.random((rows, n), 5)?, gpu.random((rows, width), 6)?);
                let c = (magnitude.to_device(&Device::Cpu)? * inverse.to_device(&Device::Cpu)?)?
                    .to_dtype(DType::F64)?;
                for (add, shift) in [(false, 0.0), (true, 1.0)] {
                    let found = gpu.put(&y)?;
                    let factor = Factor { magnitude: &magnitude, inverse: &inverse, shift, strength: 0.6 };
                    let z_there = gpu.put(&z)?;
                    scale(Columns { of: &z_there, at: 0 }, Columns { of: &found, at }, add, factor)?;
                    let scaled = z.broadcast_mul(&((&c - shift)? * 0.6)?)?;
                    let before = y.narrow(1, at, n)?;
                    let middle = if add { (before + scaled)? } else { scaled };
                    let right = y.narrow(1, at + n, width - at - n)?;
                    gpu.same(&found, &Tensor::cat(&[&y.narrow(1, 0, at)?, &middle, &right], 1)?)?;
                }
                let grads = gpu.put_as(DType::F32, judge::random(n + 1, 7)?.as_tensor())?;
                let before = grads.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let to = grads.narrow(0, 1, n)?;
                gradient(Columns { of: &gpu.put(&y)?, at }, &gpu.put(&z)?, &inverse, &to)?;
                let inverse = inverse.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let sums = ((z.as_tensor() * y.narrow(1, at, n)?)?.sum(0)? * inverse)?;
                let expected =
                    Tensor::cat(&[&before.narrow(0, 0, 1)?, &(before.narrow(0, 1, n)? + sums)?], 0)?;
                gpu.same(&grads, &expected)?;
            }
            Ok(())
        })
    }
}

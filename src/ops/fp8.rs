//! Products with frozen weights in E4M3: activations, gradients and weights -> 8 bits with a scale for each row, and
//! their product with sums in f32.
//!
//! `y = x W^T` contracts over the columns of W, and its gradient `dx = dy W` over the rows; W is rounded for each of
//! them along its own contraction. Scales are powers of two, so that numbers in E4M3's normal range are rounded alike
//! in both, and the gradient is that of the product that was computed. Every row is scaled by its present values; there
//! is no history of earlier passes. A row with a number that is not finite gives a row of NaN.
//!
//! On a GPU, `kernels/fp8.cu` rounds and cublasLt multiplies. Kernels of norms and activations, whose blocks have
//! whole rows, write them rounded beside their results (`kernels/rounded.cuh`), with the bits of `rows`. Cards of
//! compute capability 9.0 scale in the product; on others a kernel scales the sums. The CPU path has the same rounding,
//! for tests and studies.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::eight_bits;
use super::four_bit::FourBit;
use super::operand::{Operand, View};
use super::weight::Weight;
use crate::facts::Precision;

/// Rows and columns of a weight must be multiples of this: cublasLt wants rows of whole 16 bytes.
pub const MULTIPLE: usize = 16;
/// Columns of a weight that share a scale in its transpose.
const COLUMNS: usize = 64;
/// Rows that are bounded together on a GPU.
#[cfg(feature = "cuda")]
const ROWS: usize = 512;
/// The least exponent of a scale.
const EXPONENT_MIN: i32 = -100;

/// A matrix in E4M3 with a scale for each row.
#[derive(Clone, Debug)]
pub struct Scaled {
    /// The numbers [rows, cols]: their bits as u8 on a GPU, and f32 on a CPU.
    pub codes: Tensor,
    /// f32 `[rows]`.
    pub scales: Tensor,
}

/// Returns whether a weight [rows, cols] can be multiplied in 8 bits. Others are multiplied in bf16.
pub fn takes(rows: usize, cols: usize) -> bool {
    rows.is_multiple_of(MULTIPLE) && cols.is_multiple_of(MULTIPLE)
}

/// Returns columns at..at+cols of x [T, at + cols or more].
pub fn rows(x: &Tensor, at: usize, cols: usize) -> Result<Scaled> {
    let (rows, width) = x.dims2()?;
    assert!(at + cols <= width && takes(at, cols), "columns {at}..{} of {width}", at + cols);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::rows(x, at, cols);
    }
    let data = &*cpu::read::<f32>(x)?;
    scaled(rows, cols, |row, to| {
        to.copy_from_slice(&data[row * width + at..][..cols]);
        largest(to)
    })
}

/// Returns memory for a matrix [rows, cols] on `like`'s GPU, for a kernel that writes its result in 8 bits too.
#[cfg(feature = "cuda")]
pub fn empty(rows: usize, cols: usize, like: &Tensor) -> Result<Scaled> {
    let codes = super::unwritten((rows, cols), candle_core::DType::U8, like.device())?;
    Ok(Scaled { codes, scales: super::unwritten(rows, candle_core::DType::F32, like.device())? })
}

/// `y[:, at..at+N] = alpha * x W^T + beta * y[:, at..at+N]`. beta is 0 or 1.
pub fn forward(x: &Scaled, weight: &Weight, alpha: f64, y: &Tensor, at: usize, beta: f64) -> Result<()> {
    multiply(x, &of_weight(weight, false)?, alpha, y, at, beta, None, true)
}

/// `alpha * x W^T + base` in memory of its own: base [T, N].
pub fn onto(x: &Scaled, weight: &Weight, alpha: f64, base: &Tensor) -> Result<Tensor> {
    let sum = super::unwritten(base.shape(), base.dtype(), base.device())?;
    multiply(x, &of_weight(weight, false)?, alpha, &sum, 0, 1.0, Some(base), true)?;
    Ok(sum)
}

/// `dx = alpha * dy W + beta * dx`. beta is 0 or 1.
pub fn input_gradient(dy: &Scaled, weight: &Weight, alpha: f64, dx: &Tensor, beta: f64) -> Result<()> {
    multiply(dy, &of_weight(weight, true)?, alpha, dx, 0, beta, None, false)
}

/// Returns the weight [N, K], or its transpose [K, N]. It is kept if the weight keeps its expanded form.
pub fn of_weight(weight: &Weight, transposed: bool) -> Result<Scaled> {
    let make = || {
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            return gpu::of_weight(weight, transposed);
        }
        of_weight_on_cpu(weight, transposed)
    };
    match weight {
        Weight::Dense(_) => make(),
        Weight::FourBit(stored) => {
            let (codes, scales) =
                stored.expanded.eight_bits(transposed, || make().map(|made| (made.codes, made.scales)))?;
            Ok(Scaled { codes, scales })
        }
    }
}

/// Returns the number of bytes of a weight and its transpose on a GPU.
pub fn weight_bytes(rows: usize, cols: usize) -> usize {
    2 * rows * cols + 4 * (rows + cols)
}

/// `y[:, at..] = alpha * x w^T + beta * base`, or with y itself for `None`: x [T, C], w [M, C].
#[allow(clippy::too_many_arguments)]
fn multiply(
    x: &Scaled,
    w: &Scaled,
    alpha: f64,
    y: &Tensor,
    at: usize,
    beta: f64,
    base: Option<&Tensor>,
    fast: bool,
) -> Result<()> {
    let ((rows, depth), (columns, w_depth), (y_rows, width)) =
        (x.codes.dims2()?, w.codes.dims2()?, y.dims2()?);
    assert!(
        depth == w_depth && y_rows == rows && at + columns <= width,
        "{rows}x{depth} by {columns}x{w_depth}"
    );
    assert!((beta == 0.0 || beta == 1.0) && base.is_none_or(|base| base.dims() == y.dims()), "what is added");
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        let scaling = gpu::Scaling::of(y)?;
        return gpu::multiply(scaling, x, w, alpha, y, at, beta, base, fast);
    }
    let _ = fast;
    let sums = cpu::tensor(vec![0f32; rows * columns], (rows, columns))?;
    {
        let (x, w) = (&*cpu::read::<f32>(&x.codes)?, &*cpu::read::<f32>(&w.codes)?);
        let (x, w) = (Operand::View(View::rows(x, depth)), Operand::View(View::rows(w, depth).transposed()));
        // Numbers in E4M3 are numbers in bf16.
        cpu::edit(&sums, |sums: &mut [f32]| {
            f32::product([rows, columns, depth], 1.0, x, w, 0.0, sums, columns, Precision::Bf16)
        })?;
    }
    let (sums, of_x, of_w) =
        (&*cpu::read::<f32>(&sums)?, &*cpu::read::<f32>(&x.scales)?, &*cpu::read::<f32>(&w.scales)?);
    let below = base.map(cpu::read::<f32>).transpose()?;
    let alpha = alpha as f32;
    cpu::edit(y, |y: &mut [f32]| {
        y.par_chunks_mut(width).enumerate().for_each(|(row, y)| {
            let sums = &sums[row * columns..][..columns];
            for (column, (y, sum)) in y[at..at + columns].iter_mut().zip(sums).enumerate() {
                let below = match &below {
                    _ if beta == 0.0 => 0.0,
                    Some(below) => below[row * width + at + column],
                    None => *y,
                };
                *y = alpha * of_x[row] * of_w[column] * sum + below;
            }
        });
    })
}

/// Returns the least power of two with which 448 reaches `largest`, and its reciprocal.
fn scale_of(largest: f32) -> (f32, f32) {
    let bits = largest.to_bits();
    let exponent = (bits >> 23) as i32 - 127 - 8 + i32::from(bits & 0x7f_ffff > 0x60_0000);
    let exponent = exponent.max(EXPONENT_MIN);
    (f32::from_bits(((exponent + 127) as u32) << 23), f32::from_bits(((127 - exponent) as u32) << 23))
}

/// Returns the largest size among values; NaN if one is not finite.
fn largest(values: &[f32]) -> f32 {
    let (most, poison) =
        values.iter().fold((0f32, 0f32), |(most, poison), x| (most.max(x.abs()), poison + x * 0.0));
    most + poison
}

/// Returns a matrix whose rows `fill` writes. `fill` returns a bound of the sizes in a row; NaN: some are not finite.
fn scaled(rows: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) -> f32 + Sync) -> Result<Scaled> {
    let (mut codes, mut scales) = (vec![0f32; rows * cols], vec![0f32; rows]);
    let rows_of = codes.par_chunks_mut(cols.max(1)).zip(&mut scales).enumerate();
    rows_of.for_each(|(row, (to, scale))| {
        let bound = fill(row, to);
        let (found, inverse) = scale_of(if bound.is_nan() { 0.0 } else { bound });
        *scale = if bound.is_nan() { f32::NAN } else { found };
        to.iter_mut().for_each(|x| *x = eight_bits::widen(eight_bits::narrow(*x * inverse)));
    });
    Ok(Scaled { codes: cpu::tensor(codes, (rows, cols))?, scales: cpu::tensor(scales, rows)? })
}

fn of_weight_on_cpu(weight: &Weight, transposed: bool) -> Result<Scaled> {
    let (n, k) = weight.dims();
    let (values, bounds) = match weight {
        Weight::FourBit(stored) => (stored.dequantize()?, bounds_of_four_bit(stored, transposed)?),
        Weight::Dense(tensor) => {
            let values: Vec<f32> = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
            let bounds = bounds(n, k, transposed, |row, columns| largest(&values[row * k..][columns]));
            (values, bounds)
        }
    };
    match transposed {
        false => scaled(n, k, |row, to| {
            to.copy_from_slice(&values[row * k..][..k]);
            bounds[row]
        }),
        true => scaled(k, n, |column, to| {
            to.iter_mut().enumerate().for_each(|(row, to)| *to = values[row * k + column]);
            bounds[column / COLUMNS]
        }),
    }
}

/// Returns bounds of a weight's sizes: of each row, or of each group of columns. `of` has a bound of some columns of a
/// row.
fn bounds(
    n: usize,
    k: usize,
    transposed: bool,
    of: impl Fn(usize, std::ops::Range<usize>) -> f32,
) -> Vec<f32> {
    match transposed {
        false => (0..n).map(|row| of(row, 0..k)).collect(),
        true => (0..k)
            .step_by(COLUMNS)
            .map(|from| (0..n).map(|row| of(row, from..k.min(from + COLUMNS))).fold(0.0, f32::max))
            .collect(),
    }
}

/// Returns bounds of the magnitudes. No code is larger than 1, so that a block's scale bounds its values.
fn bounds_of_four_bit(weight: &FourBit, transposed: bool) -> Result<Vec<f32>> {
    let (scales, cols) = (weight.scales()?, weight.cols);
    Ok(bounds(weight.rows, cols, transposed, |row, columns| {
        let (from, last) = (row * cols + columns.start, row * cols + columns.end - 1);
        scales[from / weight.block..=last / weight.block]
            .iter()
            .fold(0.0, |most, scale| most.max(scale.abs()))
    }))
}

/// The launches of `kernels/fp8.cu`, and products by cublasLt.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{DType, bail};

    use super::*;
    use crate::ops::cuda::product::{Codes, Matrix, product_of_codes};
    use crate::ops::cuda::{self, Launch, device};
    use crate::ops::four_bit::Absmax;
    use crate::ops::unwritten;

    const THREADS: usize = 256;
    /// Threads of a row of activations.
    const ROW_THREADS: usize = 128;
    /// Rows of a weight that a block of its transposition takes.
    const TILE: usize = 128;

    /// The place at which the sums of a product are scaled.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Scaling {
        /// In the product: a scale for each row and each column, which only cards of 9.0 have.
        Inside,
        /// A kernel behind the product scales them.
        Behind,
    }

    impl Scaling {
        /// Returns the way of a tensor's GPU.
        pub fn of(tensor: &Tensor) -> Result<Scaling> {
            match device::capability(cuda::device(tensor)?)? {
                (9, 0) => Ok(Scaling::Inside),
                _ => Ok(Scaling::Behind),
            }
        }
    }

    impl<'a> Launch<'a> {
        /// Adds the places of a matrix in 8 bits, codes and scales, if there is one.
        pub fn rounded(self, to: Option<&Scaled>) -> Launch<'a> {
            match to {
                Some(to) => self.of(DType::U8, &to.codes).of(DType::F32, &to.scales),
                None => self,
            }
        }
    }

    impl Scaled {
        fn scaled(&self) -> Codes<'_> {
            Codes { bits: &self.codes, scales: Some(&self.scales) }
        }

        fn bare(&self) -> Codes<'_> {
            Codes { bits: &self.codes, scales: None }
        }
    }

    /// See `super::rows`.
    pub fn rows(x: &Tensor, at: usize, cols: usize) -> Result<Scaled> {
        let (rows, width) = x.dims2()?;
        if !width.is_multiple_of(8) {
            bail!("rows of {width} values: a GPU takes whole groups of eight");
        }
        let made = empty(rows, cols, x)?;
        let launch = Launch::new(x, "fp8", "rows")?.tensor_at(x, at);
        let launch = launch.of(DType::U8, &made.codes).of(DType::F32, &made.scales).int(cols).int(width);
        launch.launch((rows, 1, 1), ROW_THREADS, 0)?;
        Ok(made)
    }

    /// See `super::of_weight`.
    pub fn of_weight(weight: &Weight, transposed: bool) -> Result<Scaled> {
        let (n, k) = weight.dims();
        match (weight, transposed) {
            (Weight::Dense(tensor), false) => rows(tensor, 0, k),
            (Weight::Dense(tensor), true) => {
                let launch = |name: &str| Ok(Launch::new(tensor, "fp8", name)?.tensor(tensor));
                turned(n, k, tensor, launch)
            }
            (Weight::FourBit(stored), false) => {
                let made = empty(n, k, &stored.packed)?;
                let launch = four_bit(stored, "four_bit_rows")?;
                let launch = launch.of(DType::U8, &made.codes).of(DType::F32, &made.scales).int(n).int(k);
                launch.launch((n.div_ceil(THREADS / 32), 1, 1), THREADS, 0)?;
                Ok(made)
            }
            (Weight::FourBit(stored), true) => turned(n, k, &stored.packed, |name| {
                four_bit(stored, if name == "largest" { "four_bit_largest" } else { "four_bit_turned" })
            }),
        }
    }

    /// Returns the transpose of a weight [n, k], whose kernels `launch` begins.
    fn turned<'a>(
        n: usize,
        k: usize,
        like: &Tensor,
        launch: impl Fn(&str) -> Result<Launch<'a>>,
    ) -> Result<Scaled> {
        let (groups, parts) = (k.div_ceil(COLUMNS), n.div_ceil(ROWS));
        let (made, bounds) = (empty(k, n, like)?, unwritten((parts, groups), DType::F32, like.device())?);
        let largest = launch("largest")?.of(DType::F32, &bounds).int(n).int(k);
        largest.launch((groups, parts, 1), THREADS, 0)?;
        let turned = launch("turned")?.of(DType::F32, &bounds).of(DType::U8, &made.codes);
        let turned = turned.of(DType::F32, &made.scales).int(n).int(k);
        turned.launch((groups, n.div_ceil(TILE), 1), THREADS, 0)?;
        Ok(made)
    }

    fn four_bit<'a>(weight: &'a FourBit, name: &str) -> Result<Launch<'a>> {
        let FourBit { code, block, packed, absmax, .. } = weight;
        if !block.is_power_of_two() || *block < 8 {
            bail!("blocks of {block}: a GPU takes powers of two from 8 on");
        }
        let launch = Launch::untyped(cuda::device(packed)?, "fp8", name).of(DType::U8, packed);
        let launch = match absmax {
            Absmax::Plain(absmax) => launch.optional(DType::U8, None).of(absmax.dtype(), absmax).float(0.0),
            Absmax::Nested { codes, absmax, offset } => {
                launch.of(DType::U8, codes).of(DType::F32, absmax).float(f64::from(*offset))
            }
        };
        Ok(launch.int(block.ilog2() as usize).int(*code as usize))
    }

    /// See `super::multiply`.
    #[allow(clippy::too_many_arguments)]
    pub fn multiply(
        scaling: Scaling,
        x: &Scaled,
        w: &Scaled,
        alpha: f64,
        y: &Tensor,
        at: usize,
        beta: f64,
        base: Option<&Tensor>,
        fast: bool,
    ) -> Result<()> {
        let ((rows, _), (columns, _), (_, width)) = (x.codes.dims2()?, w.codes.dims2()?, y.dims2()?);
        let to = Matrix::rows(y, at, width);
        if scaling == Scaling::Inside {
            let from = base.map_or(to, |base| Matrix::rows(base, at, width));
            return match product_of_codes(alpha, [x.scaled(), w.scaled()], beta, [from, to], fast)? {
                true => Ok(()),
                false => multiply(Scaling::Behind, x, w, alpha, y, at, beta, base, fast),
            };
        }
        // Bare sums reach 448^2 times the depth, which bf16 holds; scaling them is exact except for alpha.
        let (apart, below) = match beta == 0.0 {
            true => (None, None),
            false => (Some(unwritten((rows, columns), y.dtype(), y.device())?), Some(base.unwrap_or(y))),
        };
        let (sums, sums_at, stride) = apart.as_ref().map_or((y, at, width), |sums| (sums, 0, columns));
        let sums_matrix = Matrix::rows(sums, sums_at, stride);
        if !product_of_codes(1.0, [x.bare(), w.bare()], 0.0, [sums_matrix, sums_matrix], fast)? {
            let depth = x.codes.dim(1)?;
            bail!("cublasLt has no product in E4M3 for {rows} x {columns} x {depth} on this GPU");
        }
        let launch = Launch::new(y, "fp8", "finish")?.tensor_at(sums, sums_at);
        let launch = launch.of(DType::F32, &x.scales).of(DType::F32, &w.scales);
        let launch = match below {
            Some(below) => launch.tensor_at(below, at),
            None => launch.optional(y.dtype(), None),
        };
        let launch = launch.tensor_at(y, at).float(alpha).int(columns).int(stride).int(width);
        launch.launch((rows, 1, 1), ROW_THREADS, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::judge;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Returns the values that a matrix in 8 bits stands for.
    fn plain(of: &Scaled) -> Result<Tensor> {
        of.codes.to_dtype(DType::F64)?.broadcast_mul(&of.scales.to_dtype(DType::F64)?.unsqueeze(1)?)
    }

    /// Returns weights of all forms.
    fn weights(n: usize, k: usize) -> Result<Vec<Weight>> {
        let random = judge::random((n, k), 7)?.to_dtype(DType::F32)?.detach();
        let floats = values(&random);
        Ok(vec![
            Weight::Dense(random.clone()),
            Weight::FourBit(FourBit::quantize(&floats, n, k, Code::Nf4, true)?),
            Weight::FourBit(FourBit::quantize(&floats, n, k, Code::Fp4, false)?),
        ])
    }

    /// Returns sizes from the least to the largest, zeros, and numbers that are not finite.
    fn edges() -> Result<Tensor> {
        let mut list = vec![0f32; 8 * 16];
        let rows: [&[f32]; 8] = [
            &[0.0, -0.0],
            &[448.0, -448.0, 449.0, 1.0],
            &[449.0, 0.5, 0.0078],
            &[3.0e38, 1.0],
            &[1.0e-40, -1.0e-38],
            &[f32::INFINITY, 1.0],
            &[f32::NAN, 1.0],
            &[1.0e-6, 2.5e-9, -3.0e-7],
        ];
        rows.iter().enumerate().for_each(|(i, row)| list[i * 16..][..row.len()].copy_from_slice(row));
        Tensor::from_vec(list, (8, 16), &Device::Cpu)
    }

    #[test]
    fn scales_are_the_least_powers_of_two_that_reach_the_largest_size() {
        for (largest, scale) in
            [(448.0, 1.0), (448.1, 2.0), (1.0, 1.0 / 256.0), (1.75, 1.0 / 256.0), (1.76, 1.0 / 128.0)]
        {
            assert_eq!(scale_of(largest), (scale, 1.0 / scale), "{largest}");
        }
        assert_eq!(scale_of(0.0), (2f32.powi(-100), 2f32.powi(100)));
        let (scale, inverse) = scale_of(f32::MAX);
        assert!((448.0 * scale).is_infinite() && scale * inverse == 1.0);
    }

    /// A row with an infinity or a NaN becomes NaN as a whole, and no other; zeros stay zeros.
    #[test]
    fn what_is_not_finite_stays_visible_in_its_row() -> Result<()> {
        let (x, weight) = (rows(&edges()?, 0, 16)?, Tensor::ones((16, 16), DType::F32, &Device::Cpu)?);
        let y = Tensor::zeros((8, 16), DType::F32, &Device::Cpu)?;
        forward(&x, &Weight::Dense(weight), 1.0, &y, 0, 0.0)?;
        for (row, y) in y.to_vec2::<f32>()?.iter().enumerate() {
            assert_eq!(y[0].is_nan(), row == 5 || row == 6, "row {row}: {}", y[0]);
        }
        assert_eq!(y.to_vec2::<f32>()?[0], [0.0; 16]);
        Ok(())
    }

    /// Each value is within half a step of E4M3: 1/16 of its size, or 2^-10 of the row's scale. A weight in its normal
    /// range is the same number in both forms.
    #[test]
    fn values_are_rounded_once_and_alike_in_both_forms() -> Result<()> {
        for weight in weights(48, 160)? {
            let (straight, turned) = (of_weight(&weight, false)?, of_weight(&weight, true)?);
            let exact = match &weight {
                Weight::Dense(values) => values.clone(),
                Weight::FourBit(stored) => Tensor::from_vec(stored.dequantize()?, (48, 160), &Device::Cpu)?,
            };
            let exact = exact.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            let (scales, columns) = (values(&straight.scales), values(&turned.scales));
            let (rounded, back) =
                (plain(&straight)?.to_vec2::<f64>()?, plain(&turned)?.t()?.to_vec2::<f64>()?);
            for (n, row) in exact.iter().enumerate() {
                for (k, &value) in row.iter().enumerate() {
                    let step = (value.abs() / 16.0).max(f64::from(scales[n]) / 1024.0);
                    assert!((rounded[n][k] - value).abs() <= step, "{value}: {}", rounded[n][k]);
                    let normal = f64::from(scales[n].max(columns[k])) / 64.0;
                    assert!(value.abs() < normal || rounded[n][k] == back[n][k], "{value}, {normal}");
                }
            }
        }
        Ok(())
    }

    /// Products on a CPU equal those of the rounded matrices in f64, beside columns that they leave alone.
    #[test]
    fn products_equal_those_of_the_rounded_matrices() -> Result<()> {
        for weight in weights(48, 160)? {
            let x = judge::random((5, 160), 1)?.to_dtype(DType::F32)?;
            let (x, w) = (rows(&x, 0, 160)?, plain(&of_weight(&weight, false)?)?);
            let base = judge::random((5, 80), 2)?.to_dtype(DType::F32)?.detach();
            for beta in [0.0, 1.0] {
                let y = base.copy()?;
                forward(&x, &weight, 0.3, &y, 16, beta)?;
                let below = (base.narrow(1, 16, 48)?.to_dtype(DType::F64)? * beta)?;
                judge::same(
                    &y.narrow(1, 16, 48)?.force_contiguous()?,
                    &((plain(&x)?.matmul(&w.t()?)? * 0.3)? + below)?,
                    1e-5,
                )?;
                judge::same(
                    &y.narrow(1, 64, 16)?.force_contiguous()?,
                    &base.narrow(1, 64, 16)?.force_contiguous()?,
                    0.0,
                )?;
            }
            let dy = rows(&base, 16, 48)?;
            let dx = Tensor::zeros((5, 160), DType::F32, &Device::Cpu)?;
            input_gradient(&dy, &weight, 1.0, &dx, 0.0)?;
            judge::same(&dx, &plain(&dy)?.matmul(&plain(&of_weight(&weight, true)?)?.t()?)?, 1e-5)?;
        }
        Ok(())
    }

    /// A weight is rounded once if it keeps its expanded form.
    #[test]
    fn rounded_weights_are_kept_if_they_are_wanted() -> Result<()> {
        let weight = weights(16, 64)?.remove(1);
        let Weight::FourBit(stored) = &weight else { unreachable!("a 4-bit weight") };
        stored.expanded.keep(true);
        let first = of_weight(&weight, false)?;
        assert_eq!(first.codes.id(), of_weight(&weight, false)?.codes.id());
        assert_ne!(first.codes.id(), of_weight(&weight, true)?.codes.id());
        stored.expanded.keep(false);
        assert_ne!(first.codes.id(), of_weight(&weight, false)?.codes.id());
        Ok(())
    }

    /// Expects equal bits of codes and of scales as f32.
    #[cfg(feature = "cuda")]
    fn same_bits(on_gpu: &Scaled, on_cpu: &Scaled, what: &str) -> Result<()> {
        let bits = on_gpu.codes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        let (found, expected) = (values(&on_gpu.scales.to_device(&Device::Cpu)?), values(&on_cpu.scales));
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{what}, row {row}: {found} {expected}"
            );
        }
        let cols = on_cpu.codes.dim(1)?;
        for (i, (bits, expected)) in bits.iter().zip(values(&on_cpu.codes)).enumerate() {
            let (found, poisoned) =
                (eight_bits::widen::<f32>(*bits), expected.is_nan() || found[i / cols].is_nan());
            assert!(
                poisoned || found.to_bits() == expected.to_bits(),
                "{what}, value {i}: {found} {expected}"
            );
        }
        Ok(())
    }

    /// Activations, weights of all forms and their transposes on the GPU have the CPU's bits.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernels_bits_equal_the_cpus_in_8_bits() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (n, k) in [(16, 16), (48, 64), (144, 160), (528, 80), (32, 1040)] {
                let x = gpu.random((n, k + 16), 1)?.to_dtype(DType::F32)?.detach();
                same_bits(&rows(&gpu.put(&x)?, 16, k)?, &rows(&x, 16, k)?, "rows")?;
                for (kind, weight) in weights(n, k)?.into_iter().enumerate() {
                    let (on_cpu, on_gpu) = match &weight {
                        Weight::Dense(values) => {
                            let stored = values.to_dtype(gpu.dtype)?.to_dtype(DType::F32)?;
                            (Weight::Dense(stored), Weight::Dense(gpu.put(values)?))
                        }
                        Weight::FourBit(stored) => {
                            let moved = Weight::FourBit(stored.to_device(&gpu.device)?);
                            (weight, moved)
                        }
                    };
                    for transposed in [false, true] {
                        let what = format!("[{n}, {k}], kind {kind}, transposed {transposed}");
                        same_bits(&of_weight(&on_gpu, transposed)?, &of_weight(&on_cpu, transposed)?, &what)?;
                    }
                }
            }
            // bf16 rounds the edges first.
            let edges = edges()?.to_dtype(gpu.dtype)?.to_dtype(DType::F32)?;
            same_bits(&rows(&gpu.put(&edges)?, 0, 16)?, &rows(&edges, 0, 16)?, "edges")
        })
    }

    /// Returns rows of all sizes; some have numbers that are not finite.
    #[cfg(feature = "cuda")]
    fn rows_of_all_sizes(gpu: &judge::Gpu, rows: usize, cols: usize, seed: u64) -> Result<Tensor> {
        let sizes = [1.0, 3.0e-5, 0.0, 4.0e3, 1.0e-36, 1.0e30, 17.0];
        let sizes: Vec<f64> = (0..rows).map(|row| sizes[(row + seed as usize) % sizes.len()]).collect();
        let values = judge::random((rows, cols), seed)?.broadcast_mul(&Tensor::from_vec(
            sizes,
            (rows, 1),
            &Device::Cpu,
        )?)?;
        let mut values: Vec<f32> = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        for (row, special) in [(1, f32::NAN), (4, f32::INFINITY), (5, f32::MIN)] {
            if row < rows {
                values[row * cols + (row * 7) % cols] = special;
            }
        }
        gpu.put(&Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
    }

    /// Checks that values which a kernel has rounded have the bits of `rows` over the values that it stored.
    #[cfg(feature = "cuda")]
    fn as_a_pass_rounds(found: &Scaled, stored: &Tensor, at: usize, what: &str) -> Result<()> {
        let expected = rows(stored, at, found.codes.dim(1)?)?;
        let codes = |of: &Scaled| of.codes.to_device(&Device::Cpu)?.to_vec2::<u8>();
        let scales = |of: &Scaled| of.scales.to_device(&Device::Cpu)?.to_vec1::<f32>();
        for (row, (found, expected)) in scales(found)?.iter().zip(&scales(&expected)?).enumerate() {
            let alike = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(alike, "{what}, row {row}: scale {found}, by a pass {expected}");
        }
        assert!(codes(found)? == codes(&expected)?, "{what}: other codes");
        Ok(())
    }

    /// Returns the bits of the first `width` columns.
    #[cfg(feature = "cuda")]
    fn bits(tensor: &Tensor, width: usize) -> Result<Vec<u32>> {
        let host = judge::first(tensor, width)?.to_dtype(DType::F32)?.flatten_all()?;
        Ok(host.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }

    /// Rows, columns and spare columns of the tests below.
    #[cfg(feature = "cuda")]
    const SHAPES: [(usize, usize, usize); 5] =
        [(1, 16, 0), (7, 48, 64), (9, 272, 64), (8, 2064, 128), (3, 4096, 64)];

    /// Norms round their results and the sums with their gradients as a separate pass does. The stored values have the
    /// same bits with rounding and without.
    #[cfg(feature = "cuda")]
    #[test]
    fn norms_round_what_they_store_as_a_pass_does() -> Result<()> {
        use crate::ops::{layer_norm, rms_norm};
        judge::on_gpu(|gpu| {
            for (rows, cols, spare) in SHAPES.into_iter().filter(|_| gpu.dtype == DType::BF16) {
                let of = |seed| rows_of_all_sizes(gpu, rows, cols, seed);
                let (x, dy) = (of(1)?, of(2)?);
                let weight = |seed| gpu.put_as(DType::F32, judge::random(cols, seed)?.as_tensor());
                let (w, b) = (weight(3)?, weight(4)?);
                let beside = judge::random((rows, 64), 6)?.to_dtype(DType::BF16)?.detach();
                let wide = || gpu.put(&Tensor::cat(&[of(5)?.to_device(&Device::Cpu)?, beside.clone()], 1)?);

                let (y, _, rounded) = rms_norm::forward_rounded(&x, &w, 1e-5, spare)?;
                as_a_pass_rounds(&rounded, &y, 0, "rms_norm")?;
                let plain = rms_norm::forward_beside(&x, &w, 1e-5, spare)?;
                assert_eq!(bits(&y, cols)?, bits(&plain, cols)?, "rms_norm {cols}");
                let (found, plain) = (wide()?, wide()?);
                let rounded = rms_norm::backward_rounded(&dy, &x, &w, 1e-5, &found)?;
                rms_norm::backward(&dy, &x, &w, 1e-5, &plain)?;
                as_a_pass_rounds(&rounded, &found, 0, "rms_norm's gradient")?;
                assert_eq!(bits(&found, cols + 64)?, bits(&plain, cols + 64)?, "rms_norm's gradient {cols}");

                let (y, rounded) = layer_norm::forward_rounded(&x, &w, &b, 1e-5, spare)?;
                as_a_pass_rounds(&rounded, &y, 0, "layer_norm")?;
                let plain = layer_norm::forward_beside(&x, &w, &b, 1e-5, spare)?;
                assert_eq!(bits(&y, cols)?, bits(&plain, cols)?, "layer_norm {cols}");
                let (found, plain) = (wide()?, wide()?);
                let rounded = layer_norm::backward_rounded(&dy, &x, &w, 1e-5, &found)?;
                layer_norm::backward(&dy, &x, &w, 1e-5, &plain)?;
                as_a_pass_rounds(&rounded, &found, 0, "layer_norm's gradient")?;
                assert_eq!(
                    bits(&found, cols + 64)?,
                    bits(&plain, cols + 64)?,
                    "layer_norm's gradient {cols}"
                );
            }
            Ok(())
        })
    }

    /// Activations and their gradients, as one matrix and as two, in the same way.
    #[cfg(feature = "cuda")]
    #[test]
    fn activations_round_what_they_store_as_a_pass_does() -> Result<()> {
        use crate::facts::{Activation, Function};
        use crate::ops::activation;
        let forms = [(true, true, 1), (true, false, 2), (false, true, 1)];
        let functions = [Function::Silu, Function::GeluTanh, Function::GeluErf];
        let cases = functions.into_iter().flat_map(|function| forms.map(|form| (function, form)));
        let cases: Vec<_> = cases.flat_map(|case| SHAPES.map(|shape| (case, shape))).collect();
        judge::on_gpu(|gpu| {
            for ((function, (gated, keep, parts)), (rows, cols, spare)) in cases.iter().copied() {
                if gpu.dtype != DType::BF16 {
                    return Ok(());
                }
                let (activation, columns) =
                    (Activation { function, gated }, if gated { 2 * cols } else { cols });
                let what = format!("{activation:?} {cols}, {parts} parts");
                let x = rows_of_all_sizes(gpu, rows, columns, 7)?;
                let (h, rounded) = activation::forward_rounded(&x, activation, spare)?;
                as_a_pass_rounds(&rounded, &h, 0, &what)?;
                let plain = activation::forward_beside(&x, activation, spare)?;
                assert_eq!(bits(&h, cols)?, bits(&plain, cols)?, "{what}");
                let of = || rows_of_all_sizes(gpu, rows, cols, 8);
                let (dh, also) = (of()?, of()?);
                let (d, rounded) = activation::backward_rounded(&dh, &x, activation, spare, keep, parts)?;
                assert_eq!(rounded.len(), parts, "{what}");
                for (part, rounded) in rounded.iter().enumerate() {
                    as_a_pass_rounds(rounded, &d, part * cols, &what)?;
                }
                let plain = match keep {
                    true => activation::backward_keeping(&also, &x, activation, spare)?,
                    false => activation::backward_beside(&also, &x, activation, spare)?,
                };
                assert_eq!(bits(&d, columns)?, bits(&plain, columns)?, "{what}: gradient");
                assert_eq!(bits(&dh, cols)?, bits(&also, cols)?, "{what}: what is kept");
            }
            Ok(())
        })
    }

    /// Products on the GPU, scaled inside and behind, equal those of the rounded matrices in f64, and each other's up
    /// to one rounding.
    #[cfg(feature = "cuda")]
    #[test]
    fn products_in_8_bits_on_a_gpu_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (t, n, k) in [(1, 16, 16), (7, 48, 64), (130, 144, 160)] {
                let x = gpu.random((t, k), 1)?.to_dtype(DType::F32)?.detach();
                let base = gpu.random((t, n + 32), 2)?.detach();
                let weight = weights(n, k)?.remove(1);
                let exact = plain(&rows(&x, 0, k)?)?.matmul(&plain(&of_weight(&weight, false)?)?.t()?)?;
                let Weight::FourBit(stored) = &weight else { unreachable!("a 4-bit weight") };
                let on_gpu = Weight::FourBit(stored.to_device(&gpu.device)?);
                let (x, w) = (rows(&gpu.put(&x)?, 0, k)?, of_weight(&on_gpu, false)?);
                for scaling in [gpu::Scaling::Inside, gpu::Scaling::Behind] {
                    for (beta, apart) in [(0.0, false), (1.0, false), (1.0, true)] {
                        let start = gpu.put(&base)?;
                        let y = if apart { gpu.put(&(&base * 3.0)?)? } else { start.copy()? };
                        let from = apart.then_some(&start);
                        gpu::multiply(scaling, &x, &w, 0.5, &y, 16, beta, from, true)?;
                        let part = ((&exact * 0.5)? + (base.narrow(1, 16, n)? * beta)?)?;
                        let found = y.to_device(&Device::Cpu)?.narrow(1, 16, n)?.force_contiguous()?;
                        gpu.same(&found, &part)?;
                    }
                }
                let y = gpu.put(&base)?;
                forward(&x, &on_gpu, 0.5, &y, 16, 0.0)?;
                let around = (base.narrow(1, 0, 16)?, base.narrow(1, 16 + n, 16)?);
                gpu.same(&y, &Tensor::cat(&[&around.0, &(&exact * 0.5)?, &around.1], 1)?)?;
            }
            Ok(())
        })
    }
}

//! Matrix products of activations with weights [N, K], dense or 4-bit: forward and both gradients. On a CPU,
//! `ops/gemm` packs its operands from the stored form, so a frozen 4-bit weight is never expanded in memory. On a
//! GPU, cublasLt multiplies, and a 4-bit weight is expanded for the length of one product. The few rows of a serving
//! step use `kernels/matmul.cu`, which reads the weight as it is stored. Products in `Precision::Fp8` are those of
//! `ops/fp8.rs`. The other precisions apply to the CPU only: products on a GPU have the activations' type, with sums in
//! f32.

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

#[cfg(feature = "cuda")]
use super::adapters;
use super::cpu::{self, Real};
use super::four_bit::{Absmax, FourBit, NESTED_BLOCK, dynamic_map};
use super::fp8::{self, Scaled};
use super::gemm;
use super::operand::{Operand, View};
pub use super::weight::Weight;
use crate::facts::Precision;
use crate::with_real;

/// Most rows of a product that reads a 4-bit weight as it is stored, and not expanded, on a GPU.
///
/// Predicted, to be confirmed: at M rows the kernel reads the weight once (0.52 bytes a value) and, from the L2
/// cache, all rows for every 32 columns (M/16 bytes a value at about 5.5 TB/s); expanding writes and reads 4 bytes
/// a value more (at 2.85 TB/s). Both take equally long at about M = 128; at 64 the kernel takes half as long. The
/// session's stage `serve` measures both sides.
pub const FEW_ROWS: usize = 64;

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
    if let Some(x) = in_8_bits(x, 0, k, weight, (y_width, at), precision)? {
        return fp8::forward(&x, weight, alpha, y, at, beta);
    }
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

/// Returns the columns at..at+cols of a product's left operand in 8 bits, if `precision` says so and all shapes allow
/// it. `to` is the width of the result and the first column that is written.
pub fn in_8_bits(
    x: &Tensor,
    at: usize,
    cols: usize,
    weight: &Weight,
    to: (usize, usize),
    precision: Precision,
) -> Result<Option<Scaled>> {
    let (n, k) = weight.dims();
    let whole = fp8::takes(n, k) && fp8::takes(at, x.dim(1)?) && fp8::takes(to.0, to.1);
    match precision == Precision::Fp8 && whole {
        true => fp8::rows(x, at, cols).map(Some),
        false => Ok(None),
    }
}

/// `alpha * x W^T + base` in memory of its own: x [T, K], base [T, N].
pub fn onto(x: &Tensor, weight: &Weight, alpha: f64, base: &Tensor, precision: Precision) -> Result<Tensor> {
    let ((n, k), (rows, x_width)) = (weight.dims(), x.dims2()?);
    assert!(x_width == k && base.dims() == [rows, n], "{rows}x{x_width} by {n}x{k} onto {:?}", base.dims());
    if let Some(x) = in_8_bits(x, 0, k, weight, (n, 0), precision)? {
        return fp8::onto(&x, weight, alpha, base);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::onto(x, weight, alpha, base);
    }
    let sum = base.copy()?;
    forward(x, weight, alpha, &sum, 0, 1.0, precision)?;
    Ok(sum)
}

/// Does `forward` in which a row's bits depend on that row alone, however many others there are: for rows of sequences
/// that must not influence each other. y may be f32 where x is bf16. On a GPU that is true of up to `FEW_ROWS` rows and
/// 4-bit or bf16 weights; beyond them the library of products chooses its order of sums by the number of rows. On a CPU
/// the first `short` rows are multiplied as few rows are, which is another order of sums.
#[allow(clippy::too_many_arguments)]
pub fn forward_apart(
    x: &Tensor,
    weight: &Weight,
    alpha: f64,
    y: &Tensor,
    at: usize,
    beta: f64,
    precision: Precision,
    short: usize,
) -> Result<()> {
    let ((n, k), (rows, x_width), (y_rows, y_width)) = (weight.dims(), x.dims2()?, y.dims2()?);
    assert!(
        x_width == k && y_rows == rows && at + n <= y_width,
        "{rows}x{x_width} by {n}x{k} into {y_width}"
    );
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::forward_apart(x, weight, alpha, y, at, beta);
    }
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        let mut short = short.min(rows);
        if short > 0 {
            let done = with_few::<T, _>(&[weight], &[], &mut |weights| {
                let (alpha, beta) = (T::of(alpha), T::of(beta));
                cpu::edit(y, |y: &mut [T]| T::few(x, [short, k], weights, alpha, beta, &mut y[at..], y_width, precision))
            })?;
            short = if done { short } else { 0 };
        }
        if short == rows {
            return Ok(());
        }
        with_operand::<T, _>(weight, true, |w| {
            let x = Operand::View(View::rows(&x[short * k..], k));
            let product = |y: &mut [T]| {
                let y = &mut y[short * y_width + at..];
                T::product_apart([rows - short, n, k], T::of(alpha), x, w, T::of(beta), y, y_width, precision)
            };
            cpu::edit(y, product)
        })?
    })
}

/// Does `forward_apart` of short rows alone, for weights side by side whose columns begin at `at`: x is read once.
/// False if there is no kernel for this; then nothing was done.
pub fn short_rows(
    x: &Tensor,
    weights: &[&Weight],
    alpha: f64,
    y: &Tensor,
    at: usize,
    beta: f64,
    precision: Precision,
) -> Result<bool> {
    let ((rows, k), (_, y_width)) = (x.dims2()?, y.dims2()?);
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        with_few::<T, _>(weights, &[], &mut |weights| {
            let (alpha, beta) = (T::of(alpha), T::of(beta));
            cpu::edit(y, |y: &mut [T]| T::few(x, [rows, k], weights, alpha, beta, &mut y[at..], y_width, precision))
        })
    })
}

/// Passes weights [N, K] to `body` as they are stored.
fn with_few<T: Real, R>(
    weights: &[&Weight],
    before: &[Operand<T>],
    body: &mut dyn FnMut(&[Operand<T>]) -> Result<R>,
) -> Result<R> {
    let Some((weight, rest)) = weights.split_first() else { return body(before) };
    let mut with = |weight: Operand<T>| {
        let mut list = before.to_vec();
        list.push(weight);
        with_few(rest, &list, body)
    };
    match weight {
        Weight::FourBit(weight) => {
            let Absmax::Nested { codes, absmax, offset } = &weight.absmax else {
                return with_operand(&Weight::FourBit(weight.clone()), false, with)?;
            };
            let (codes, absmax) = (&*cpu::read::<u8>(codes)?, &*cpu::read::<f32>(absmax)?);
            let (block, map, offset) = (NESTED_BLOCK, dynamic_map(), *offset);
            let nested = Some(gemm::Nested { codes, absmax, block, map, offset });
            let packed = &*cpu::read::<u8>(&weight.packed)?;
            with(Operand::FourBit { weight: stored(weight, packed, &[]), nested, transposed: false })
        }
        dense => with_operand(dense, false, with)?,
    }
}

/// Writes `alpha * x W^T + base` for weights side by side whose columns begin at `at`, in one launch, with the bits of
/// `forward_apart`. `base` is as wide as y, and may be y. False if there is no kernel for this; then nothing was done.
/// `low` is asked once there is one; the launch adds the adapters' part before it rounds. A row without adapters keeps
/// its bits.
#[cfg(feature = "cuda")]
pub fn few_rows<'a>(
    x: &Tensor,
    weights: &[&Weight],
    alpha: f64,
    y: &Tensor,
    at: usize,
    base: Option<&Tensor>,
    low: impl FnOnce() -> Result<Option<adapters::Low<'a>>>,
) -> Result<bool> {
    let ((rows, x_width), (y_rows, y_width)) = (x.dims2()?, y.dims2()?);
    let n: usize = weights.iter().map(|weight| weight.dims().0).sum();
    assert!(
        weights.iter().all(|weight| weight.dims().1 == x_width) && y_rows == rows && at + n <= y_width,
        "{rows}x{x_width} by {n} columns into {y_width}"
    );
    assert!(base.is_none_or(|base| base.dims() == y.dims()), "what is added to is as large");
    gpu::few(x, weights, alpha, y, at, base, low)
}

/// Returns whether `few_rows` has a kernel for x [rows, any] in bf16, and a y in bf16.
#[cfg(feature = "cuda")]
pub fn has_few_rows(rows: usize, weights: &[&Weight]) -> bool {
    gpu::has_few(rows, weights)
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
    if let Some(dy) = in_8_bits(dy, at, n, weight, (dx_width, 0), precision)? {
        return fp8::input_gradient(&dy, weight, alpha, dx, beta);
    }
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
            let weight = stored(weight, packed, &scales);
            Ok(body(Operand::FourBit { weight, nested: None, transposed }))
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

/// Returns a 4-bit weight as products read it. The operand says how values are rounded.
fn stored<'a>(weight: &FourBit, packed: &'a [u8], absmax: &'a [f32]) -> gemm::FourBitView<'a> {
    let (rows, cols, block, code) = (weight.rows, weight.cols, weight.block, weight.code.values());
    gemm::FourBitView { packed, absmax, code, rows, cols, block, rounding: gemm::Rounding::None }
}

/// Products on a GPU by cublasLt, through `ops/cuda`.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::product::{Matrix, product, product_onto};
    use crate::ops::cuda::{self, Launch};
    use crate::ops::rows;

    /// Rows of a tile of x, and threads of a block.
    const TILE: usize = 8;
    const THREADS: usize = 256;
    /// Bytes of its weight that a block asks for before it waits for the kernels before. On an H100, 264 to 396 blocks
    /// run at once, so that 9 to 13 MB of its L2 cache of 50 MB hold what comes ahead; the kernels before take 2 to 4
    /// us, in which 6 to 12 MB come from memory. Predicted, to be confirmed by the stage `serve`.
    const AHEAD_BYTES: usize = 32 << 10;
    /// Weights of a launch.
    const SIDE_BY_SIDE: usize = 3;
    /// k that a lane reads of a 4-bit and of a bf16 weight at a time.
    const FOUR_BIT_K: usize = 32;
    const DENSE_K: usize = 8;

    /// `y[:, at..] = alpha x W^T + beta y[:, at..]`, on the GPU.
    pub fn forward(x: &Tensor, weight: &Weight, alpha: f64, y: &Tensor, at: usize, beta: f64) -> Result<()> {
        let ((n, k), (rows, _), (_, width)) = (weight.dims(), x.dims2()?, y.dims2()?);
        let w = expand(weight, x.dtype())?;
        let (x, w) = (Matrix::rows(x, 0, k), Matrix::rows(&w, 0, k).transposed());
        product([rows, n, k], alpha, x, w, beta, Matrix::rows(y, at, width))
    }

    /// `alpha x W^T + base`, on the GPU.
    pub fn onto(x: &Tensor, weight: &Weight, alpha: f64, base: &Tensor) -> Result<Tensor> {
        let ((n, k), (rows, _)) = (weight.dims(), x.dims2()?);
        let sum = crate::ops::unwritten(base.shape(), base.dtype(), base.device())?;
        let w = expand(weight, x.dtype())?;
        let (x, w) = (Matrix::rows(x, 0, k), Matrix::rows(&w, 0, k).transposed());
        product_onto([rows, n, k], alpha, x, w, Matrix::rows(base, 0, n), Matrix::rows(&sum, 0, n))?;
        Ok(sum)
    }

    /// Multiplies by the kernels of `kernels/matmul.cu` if they have this form, otherwise as `forward`.
    pub fn forward_apart(
        x: &Tensor,
        weight: &Weight,
        alpha: f64,
        y: &Tensor,
        at: usize,
        beta: f64,
    ) -> Result<()> {
        let base = (beta != 0.0).then_some(y);
        match (beta == 0.0 || beta == 1.0) && few(x, &[weight], alpha, y, at, base, || Ok(None))? {
            true => Ok(()),
            false => forward(x, weight, alpha, y, at, beta),
        }
    }

    /// Weights that a kernel of few rows takes side by side.
    enum Sides {
        FourBit(Vec<FourBit>),
        Dense(Vec<Tensor>),
    }

    impl Sides {
        /// Returns `None` if no kernel takes these weights with an output of this type.
        fn of(weights: &[&Weight], y: DType) -> Option<Sides> {
            match weights[0] {
                Weight::FourBit(first) if y == DType::BF16 => weights
                    .iter()
                    .map(|weight| four_bit(weight, first))
                    .collect::<Option<_>>()
                    .map(Sides::FourBit),
                Weight::Dense(_) => {
                    let part = |weight: &&Weight| match weight {
                        Weight::Dense(tensor) if tensor.dtype() == DType::BF16 => Some(tensor.clone()),
                        _ => None,
                    };
                    let whole = weights[0].dims().1.is_multiple_of(DENSE_K);
                    weights.iter().map(part).collect::<Option<_>>().filter(|_| whole).map(Sides::Dense)
                }
                Weight::FourBit(_) => None,
            }
        }

        fn name(&self) -> &'static str {
            match self {
                Sides::FourBit(_) => "four_bit",
                Sides::Dense(_) => "dense",
            }
        }

        /// Returns the number of columns of y that a block makes.
        fn columns(&self, tiles: usize) -> usize {
            match self {
                Sides::FourBit(_) if tiles == 1 => 16,
                Sides::Dense(_) if tiles != 2 => 16,
                _ => 32,
            }
        }

        fn parameters<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
            match self {
                Sides::FourBit(parts) => sides(parts).fold(launch, four_bit_side),
                Sides::Dense(parts) => sides(parts).fold(launch, |launch, part| {
                    launch.optional(DType::BF16, part).int(part.map_or(0, |part| part.dims()[0]))
                }),
            }
        }
    }

    /// See `has_few_rows`.
    pub fn has_few(rows: usize, weights: &[&Weight]) -> bool {
        let fits = (1..=FEW_ROWS).contains(&rows) && (1..=SIDE_BY_SIDE).contains(&weights.len());
        fits && Sides::of(weights, DType::BF16).is_some()
    }

    /// See `few_rows`.
    pub fn few<'a>(
        x: &Tensor,
        weights: &[&Weight],
        alpha: f64,
        y: &Tensor,
        at: usize,
        base: Option<&Tensor>,
        low: impl FnOnce() -> Result<Option<adapters::Low<'a>>>,
    ) -> Result<bool> {
        let ((rows, k), (_, width)) = (x.dims2()?, y.dims2()?);
        let fits =
            x.dtype() == DType::BF16 && rows <= FEW_ROWS && (1..=SIDE_BY_SIDE).contains(&weights.len());
        if !fits
            || !cuda::address(x, 0)?.is_multiple_of(16)
            || base.is_some_and(|base| base.dtype() != y.dtype())
        {
            return Ok(false);
        }
        if rows == 0 {
            return Ok(true);
        }
        let Some(side) = Sides::of(weights, y.dtype()) else { return Ok(false) };
        let low = low()?;
        let tiles = rows.div_ceil(TILE).next_power_of_two();
        let adapted = if low.is_some() { "_adapted" } else { "" };
        let launch = Launch::new(y, "matmul", &format!("few_{}_{tiles}{adapted}", side.name()))?;
        let launch = side.parameters(launch).of(DType::BF16, x).tensor_at(y, 0);
        let launch = launch.optional(y.dtype(), base).int(rows).int(k).int(width).int(at);
        let launch = match weights[0] {
            Weight::FourBit(weight) => launch.int(weight.block.ilog2() as usize).int(weight.code as usize),
            Weight::Dense(_) => launch,
        };
        let launch = launch.float(alpha).ahead(AHEAD_BYTES);
        let launch = match &low {
            Some(low) => low.parameters(launch),
            None => launch,
        };
        let widest = weights.iter().map(|weight| weight.dims().0).max().unwrap_or(0);
        let grid = (widest.div_ceil(side.columns(tiles)), 1, weights.len());
        launch.launch(grid, THREADS, 0).map(|()| true)
    }

    /// Returns the parts, followed by `None` up to a launch's number of parts.
    fn sides<T>(parts: &[T]) -> impl Iterator<Item = Option<&T>> {
        (0..SIDE_BY_SIDE).map(|i| parts.get(i))
    }

    /// Returns a weight that the kernels take beside `first`: the values that a lane reads lie in one block and one
    /// row.
    fn four_bit(weight: &Weight, first: &FourBit) -> Option<FourBit> {
        let Weight::FourBit(weight) = weight else { return None };
        let whole = weight.block.is_power_of_two()
            && weight.block >= FOUR_BIT_K
            && weight.cols.is_multiple_of(FOUR_BIT_K);
        let nested = |weight: &FourBit| matches!(weight.absmax, Absmax::Nested { .. });
        let alike = (weight.block, weight.code, nested(weight)) == (first.block, first.code, nested(first));
        (whole && alike).then(|| weight.clone())
    }

    fn four_bit_side<'a>(launch: Launch<'a>, part: Option<&FourBit>) -> Launch<'a> {
        let launch = launch.optional(DType::U8, part.map(|part| &part.packed));
        let launch = match part.map(|part| &part.absmax) {
            Some(Absmax::Nested { codes, absmax, offset }) => {
                launch.of(DType::U8, codes).of(DType::F32, absmax).float(f64::from(*offset))
            }
            Some(Absmax::Plain(absmax)) => {
                launch.optional(DType::U8, None).of(absmax.dtype(), absmax).float(0.0)
            }
            None => launch.optional(DType::U8, None).optional(DType::F32, None).float(0.0),
        };
        launch.int(part.map_or(0, |part| part.rows))
    }

    /// Computes the gradient of `x` from columns of that of `y`, on the GPU.
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

    /// Adds the gradient of the weight. It may be f32 while x and dy are bf16; then its sums are never rounded to bf16.
    pub fn weight_gradient(dy: &Tensor, at: usize, x: &Tensor, alpha: f64, gradient: &Tensor) -> Result<()> {
        let ((n, k), (rows, width)) = (gradient.dims2()?, dy.dims2()?);
        let (dy, x) = (Matrix::rows(dy, at, width).transposed(), Matrix::rows(x, 0, k));
        product([n, k, rows], alpha, dy, x, 1.0, Matrix::rows(gradient, 0, k))
    }

    /// Returns all values in the activations' type. A tensor that is made here lives for one product: it is freed in
    /// stream order, and the next layer's weight takes its place.
    fn expand(weight: &Weight, dtype: DType) -> Result<Tensor> {
        match weight {
            Weight::Dense(tensor) => rows::convert(tensor, dtype),
            Weight::FourBit(weight) => weight.dequantize_on_gpu(dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::facts::quantization::Code;
    use crate::ops::judge::{self, Gpu};

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

    /// Few rows, whose number is that of no tile or of several, over widths that leave warps without work; into
    /// bf16 and f32. A row's bits are the same alone and among others, and a row of one 1 reads the weight's own
    /// values.
    #[test]
    fn products_of_few_rows_on_a_gpu_equal_the_formula() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, n, k) in [
                (1, 5, 32),
                (3, 40, 96),
                (8, 16, 1184),
                (9, 33, 64),
                (17, 48, 160),
                (64, 7, 288),
                (65, 3, 32),
            ] {
                let values = gpu.random((n, k), 1)?;
                for weight in kinds(gpu, &values)? {
                    few(gpu, rows, &weight)?;
                }
            }
            Ok(())
        })
    }

    /// Weights side by side in one launch, of unequal widths, onto another matrix: the bits of one after the
    /// other.
    #[cfg(feature = "cuda")]
    #[test]
    fn weights_side_by_side_on_a_gpu_are_one_launch() -> Result<()> {
        judge::on_gpu(|gpu| {
            let k = 96;
            for kind in 0..4 {
                let weight = |n: usize| {
                    Ok::<_, candle_core::Error>(
                        kinds(gpu, gpu.random((n, k), n as u64)?.as_tensor())?.remove(kind),
                    )
                };
                let weights = [weight(40)?, weight(7)?, weight(64)?];
                for rows in [1, 20] {
                    let (x, base) = (gpu.random((rows, k), 2)?, gpu.random((rows, 116), 3)?);
                    let (x, base) = (gpu.put(&x)?, gpu.put(&base)?);
                    let (found, expected) = (base.copy()?, base.copy()?);
                    let weights: Vec<&Weight> = weights.iter().collect();
                    let taken = few_rows(&x, &weights, 0.5, &found, 3, Some(&base), || Ok(None))?;
                    assert_eq!(taken, gpu.dtype == DType::BF16 && kind > 0, "{:?}, kind {kind}", gpu.dtype);
                    if !taken {
                        continue;
                    }
                    for (weight, at) in weights.iter().zip([3, 43, 50]) {
                        forward_apart(&x, weight, 0.5, &expected, at, 1.0, Precision::F32, 0)?;
                    }
                    gpu.within(0.0, &found, &expected.to_device(&Device::Cpu)?)?;
                }
            }
            Ok(())
        })
    }

    fn few(gpu: &Gpu, rows: usize, weight: &Weight) -> Result<()> {
        let ((n, k), w) = (weight.dims(), values(gpu, weight)?);
        let width = BEFORE + n + BEHIND;
        let (x, y) = (gpu.random((rows, k), 2)?, gpu.random((rows, width), 3)?);
        let columns = |y: &Tensor| y.narrow(1, BEFORE, n)?.contiguous();
        let apart = |x: &Tensor, y: &Tensor, alpha, beta| {
            forward_apart(x, weight, alpha, y, BEFORE, beta, Precision::F32, 0)
        };
        for dtype in [gpu.dtype, DType::F32] {
            for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0)] {
                let found = gpu.put_as(dtype, &y)?;
                apart(&gpu.put(&x)?, &found, alpha, beta)?;
                let part = ((x.matmul(&w.t()?)? * alpha)? + (columns(&y)? * beta)?)?;
                let around = (y.narrow(1, 0, BEFORE)?, y.narrow(1, BEFORE + n, BEHIND)?);
                gpu.same(&found, &Tensor::cat(&[&around.0, &part, &around.1], 1)?)?;
                let few = gpu.dtype == DType::BF16 && rows <= FEW_ROWS;
                for row in (0..rows).step_by(5).filter(|_| few) {
                    let alone = gpu.put_as(dtype, &y.narrow(0, row, 1)?)?;
                    apart(&gpu.put(&x.narrow(0, row, 1)?)?, &alone, alpha, beta)?;
                    gpu.within(0.0, &alone, &found.narrow(0, row, 1)?.copy()?.to_device(&Device::Cpu)?)?;
                }
            }
        }
        let unit: Vec<f64> = (0..rows * k).map(|i| f64::from(i % k == (i / k * 7 + 1) % k)).collect();
        let unit = Tensor::from_vec(unit, (rows, k), &Device::Cpu)?;
        let found = gpu.put(&y)?;
        apart(&gpu.put(&unit)?, &found, 1.0, 0.0)?;
        gpu.within(0.0, &columns(&found.to_device(&Device::Cpu)?)?, &unit.matmul(&w.t()?)?)
    }

    /// Checks a sum in memory of its own: the base stays as it is, and the bits are those of a sum in a copy of it.
    fn onto_another(gpu: &Gpu, weight: &Weight, w: &Tensor, x: &Tensor, base: &Tensor) -> Result<()> {
        let (on_gpu, before) = (gpu.put(x)?, gpu.put(base)?);
        let found = onto(&on_gpu, weight, 0.5, &before, Precision::F32)?;
        gpu.same(&found, &((x.matmul(&w.t()?)? * 0.5)? + base)?)?;
        let copied = gpu.put(base)?;
        gpu.within(0.0, &before, &copied.to_device(&Device::Cpu)?)?;
        forward(&on_gpu, weight, 0.5, &copied, 0, 1.0, Precision::F32)?;
        gpu.within(0.0, &found, &copied.to_device(&Device::Cpu)?)
    }

    /// Returns a weight in every form of storage, on the GPU.
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

    /// Returns the values that take part in a product: rounded to the activations' type.
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
        onto_another(gpu, weight, &w, x, &columns(y)?)?;
        let start = gpu.random((n, k), 4)?;
        for dtype in [gpu.dtype, DType::F32] {
            let found = gpu.put_as(dtype, &start)?;
            weight_gradient(&gpu.put(y)?, BEFORE, &gpu.put(x)?, 0.25, &found, Precision::F32)?;
            gpu.same(&found, &((columns(y)?.t()?.matmul(x)? * 0.25)? + start.as_tensor())?)?;
        }
        Ok(())
    }
}

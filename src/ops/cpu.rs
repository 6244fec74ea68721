//! CPU tensors as slices: reading, editing, and loops compiled for the machine's vector units.
//!
//! candle's own elementwise operations on the CPU are scalar and single-threaded, so hone's operations take the
//! slices and loop themselves. Training uses `f32`; tests of gradients use `f64`, whose precision finite
//! differences need.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor, WithDType, bail};

use ::gemm::Parallelism;

use super::gemm;
use super::operand::{Operand, View};
use crate::facts::Precision;

/// A number type that operations compute in: `f32` in training, `f64` in tests of gradients.
pub trait Real: Stored + Send + Sync + std::ops::Neg<Output = Self> + std::iter::Sum {
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Rounds `value` to this type.
    fn of(value: f64) -> Self;
    /// Returns the value as f64.
    fn wide(self) -> f64;
    /// Returns the exponential function.
    fn exp(self) -> Self;
    /// Returns the square root.
    fn sqrt(self) -> Self;
    /// Returns the hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Returns the error function.
    fn erf(self) -> Self;
    /// `self * a + b` with one rounding.
    fn fma(self, a: Self, b: Self) -> Self;
    /// Returns the larger of the two. If `self` is NaN the result is NaN, so that a bad value is never hidden.
    fn larger(self, other: Self) -> Self;
    /// `c[m,n] = alpha * a[m,k] b[k,n] + beta * c`, on the calling thread. Rows of `c` lie `c_row` elements apart.
    #[allow(clippy::too_many_arguments)]
    fn gemm(
        mnk: [usize; 3],
        alpha: Self,
        a: View<Self>,
        b: View<Self>,
        beta: Self,
        c: &mut [Self],
        c_row: usize,
        precision: Precision,
    );
    /// Does the same product over operands in their stored form and on all threads; see `ops::matmul`.
    #[allow(clippy::too_many_arguments)]
    fn product(
        mnk: [usize; 3],
        alpha: Self,
        a: Operand<Self>,
        b: Operand<Self>,
        beta: Self,
        c: &mut [Self],
        c_row: usize,
        precision: Precision,
    );
    /// Does `product` so that the bits of each element depend only on its row of `a` and its column of `b`.
    #[allow(clippy::too_many_arguments)]
    fn product_apart(
        mnk: [usize; 3],
        alpha: Self,
        a: Operand<Self>,
        b: Operand<Self>,
        beta: Self,
        c: &mut [Self],
        c_row: usize,
        precision: Precision,
    );
    /// Multiplies few rows of `x` by weights side by side, each [n, depth] and read once: `c = alpha * sum + beta * c`.
    /// An element's bits depend only on its row of `x` and of the weight; the order of a sum is not that of
    /// `product_apart`. False if there is no such kernel; then nothing was done.
    #[allow(clippy::too_many_arguments)]
    fn few(
        _x: &[Self],
        _rows_depth: [usize; 2],
        _weights: &[Operand<Self>],
        _alpha: Self,
        _beta: Self,
        _c: &mut [Self],
        _c_row: usize,
        _precision: Precision,
    ) -> bool {
        false
    }
    /// Returns a bf16 value in this type.
    fn widen(value: half::bf16) -> Self;
}

/// A type whose tensors can be changed in place.
pub trait Stored: WithDType {
    /// Returns a storage's elements for writing. A storage of another type is an error.
    fn slice_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;
}

macro_rules! stored {
    ($($T:ty: $kind:ident),*) => {
        $(impl Stored for $T {
            fn slice_mut(storage: &mut CpuStorage) -> Result<&mut [$T]> {
                match storage {
                    CpuStorage::$kind(data) => Ok(data),
                    _ => bail!(concat!("expected ", stringify!($T), " storage")),
                }
            }
        })*
    };
}

stored!(u8: U8, f32: F32, f64: F64);

/// LIMIT: dense f32 products with a side of at most this size (LoRA's) use the `gemm` crate. hone's own kernel is
/// made for wide products: it splits f32 into bf16 parts and would spend its time packing (figures in
/// `benches/LOG.md`).
const SKINNY_MAX: usize = 64;

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    fn of(value: f64) -> f32 {
        value as f32
    }
    fn wide(self) -> f64 {
        self as f64
    }
    /// Computes the exponential by Cephes' `expf`: reduction by ln 2 in two parts and a polynomial of degree six. The
    /// error is at most 2 ulp between -87.3 and 88.3; beyond, the result is constant. It has no branch, no call and no
    /// conversion to integers (Rust's saturates, which compiles to scalar code), so a loop over it becomes vector code:
    /// 0.3 ns a value against 5 ns of the library's, which would take a third of a training step in softmax and SiLU.
    #[inline(always)]
    fn exp(self) -> f32 {
        // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
        const SHIFT: f32 = 12_582_912.0;
        let x = self.clamp(-87.336_54, 88.376_26);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
        let n = shifted - SHIFT;
        let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
        let mut p = 1.987_569_1e-4f32;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, c);
        }
        let y = (p * r).mul_add(r, r) + 1.0;
        let scaled = f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23));
        if self.is_nan() { self } else { scaled }
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    /// Computes tanh by Cephes' odd polynomial below 0.625, and `1 - 2 / (exp(2x) + 1)` beyond, which reaches 1
    /// exactly. The error is at most 1e-7, and relative to the value below 0.625. Both forms are computed and one is
    /// chosen, so that loops become vector code.
    #[inline(always)]
    fn tanh(self) -> f32 {
        const P: [f32; 5] = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];
        let (size, square) = (self.abs(), self * self);
        let near = (polynomial(square, &P) * square).mul_add(self, self);
        let far = (1.0 - 2.0 / (Real::exp(2.0 * size) + 1.0)).copysign(self);
        if size < 0.625 { near } else { far }
    }
    /// Computes erf by Cephes' odd polynomial below 1, and Abramowitz and Stegun's 7.1.26 beyond, which reaches 1
    /// exactly. The error is at most 1.8e-7, and relative to the value below 1. Loops become vector code, as for
    /// `tanh`.
    #[inline(always)]
    fn erf(self) -> f32 {
        const NEAR: [f32; 7] = [
            7.853_861_4e-5,
            -8.010_193_6e-4,
            5.188_327_7e-3,
            -2.685_381_2e-2,
            1.128_358_5e-1,
            -3.761_262_6e-1,
            std::f32::consts::FRAC_2_SQRT_PI,
        ];
        const FAR: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
        let (size, square) = (self.abs(), self * self);
        let near = self * polynomial(square, &NEAR);
        let t = 1.0 / 0.327_591_1f32.mul_add(size, 1.0);
        let far = (1.0 - polynomial(t, &FAR) * t * Real::exp(-square)).copysign(self);
        if size < 1.0 { near } else { far }
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32) -> f32 {
        self.mul_add(a, b)
    }
    #[inline(always)]
    fn larger(self, other: f32) -> f32 {
        if self.is_nan() || self > other { self } else { other }
    }
    fn gemm(
        [m, n, k]: [usize; 3],
        alpha: f32,
        a: View<f32>,
        b: View<f32>,
        beta: f32,
        c: &mut [f32],
        c_row: usize,
        precision: Precision,
    ) {
        if precision == Precision::F32 {
            return library_gemm([m, n, k], alpha, a, b, beta, c, c_row, Parallelism::None);
        }
        let (a, b) = (a.matrix(m, k), b.matrix(k, n));
        gemm::gemm_serial(m, n, k, alpha, &a, &b, beta, c, c_row, precision);
    }
    fn product(
        [m, n, k]: [usize; 3],
        alpha: f32,
        a: Operand<f32>,
        b: Operand<f32>,
        beta: f32,
        c: &mut [f32],
        c_row: usize,
        precision: Precision,
    ) {
        if let (Precision::F32, Operand::View(a), Operand::View(b)) = (precision, a, b)
            && m.min(n).min(k) <= SKINNY_MAX
        {
            return library_gemm([m, n, k], alpha, a, b, beta, c, c_row, Parallelism::Rayon(0));
        }
        Self::product_apart([m, n, k], alpha, a, b, beta, c, c_row, precision)
    }
    /// hone's own kernels guarantee this (`ops/gemm`).
    fn product_apart(
        [m, n, k]: [usize; 3],
        alpha: f32,
        a: Operand<f32>,
        b: Operand<f32>,
        beta: f32,
        c: &mut [f32],
        c_row: usize,
        precision: Precision,
    ) {
        let (a, b) = (a.matrix(m, k, precision), b.matrix(k, n, precision));
        gemm::gemm(m, n, k, alpha, &a, &b, beta, c, c_row, precision);
    }
    fn few(
        x: &[f32],
        [rows, depth]: [usize; 2],
        weights: &[Operand<f32>],
        alpha: f32,
        beta: f32,
        c: &mut [f32],
        c_row: usize,
        precision: Precision,
    ) -> bool {
        let weights: Vec<gemm::Weight> =
            weights.iter().map(|operand| operand.of_few(depth, precision)).collect();
        gemm::few(x, depth, rows, &weights, alpha, beta, c, c_row, precision);
        true
    }
    #[inline(always)]
    fn widen(value: half::bf16) -> f32 {
        f32::from_bits(u32::from(value.to_bits()) << 16)
    }
}

/// Evaluates a polynomial; the coefficients begin with the highest power.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: &[f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for c in &coefficients[1..] {
        sum = sum.mul_add(x, *c);
    }
    sum
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn of(value: f64) -> f64 {
        value
    }
    fn wide(self) -> f64 {
        self
    }
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }
    fn erf(self) -> f64 {
        candle_core::cpu::erf::erf_f64(self)
    }
    fn fma(self, a: f64, b: f64) -> f64 {
        self.mul_add(a, b)
    }
    fn larger(self, other: f64) -> f64 {
        if self.is_nan() || self > other { self } else { other }
    }
    fn gemm(
        mnk: [usize; 3],
        alpha: f64,
        a: View<f64>,
        b: View<f64>,
        beta: f64,
        c: &mut [f64],
        c_row: usize,
        _: Precision,
    ) {
        library_gemm(mnk, alpha, a, b, beta, c, c_row, Parallelism::None);
    }
    /// Expands both operands, because tests may be slow.
    fn product(
        mnk: [usize; 3],
        alpha: f64,
        a: Operand<f64>,
        b: Operand<f64>,
        beta: f64,
        c: &mut [f64],
        c_row: usize,
        _: Precision,
    ) {
        let [m, n, k] = mnk;
        let (a, b) = (expand(&a, m, k), expand(&b, k, n));
        library_gemm(mnk, alpha, View::rows(&a, k), View::rows(&b, n), beta, c, c_row, Parallelism::None);
    }
    /// Computes one product per row.
    fn product_apart(
        mnk: [usize; 3],
        alpha: f64,
        a: Operand<f64>,
        b: Operand<f64>,
        beta: f64,
        c: &mut [f64],
        c_row: usize,
        _: Precision,
    ) {
        let [m, n, k] = mnk;
        let (a, b) = (expand(&a, m, k), expand(&b, k, n));
        let b = View::rows(&b, n);
        for (a, c) in a.chunks(k).zip(c.chunks_mut(c_row)) {
            library_gemm([1, n, k], alpha, View::rows(a, k), b, beta, c, n, Parallelism::None);
        }
    }
    fn widen(value: half::bf16) -> f64 {
        f64::from(value)
    }
}

/// Returns all values of an operand, [rows, cols] as it takes part in a product. For tests in f64.
fn expand<T: Real>(operand: &Operand<T>, rows: usize, cols: usize) -> Vec<T> {
    let fill =
        |at: &dyn Fn(usize, usize) -> T| (0..rows * cols).map(|i| at(i / cols, i % cols)).collect::<Vec<T>>();
    match operand {
        Operand::View(view) => fill(&|i, j| view.data[i * view.row + j * view.col]),
        Operand::Bf16(view) => fill(&|i, j| T::of(view.data[i * view.row + j * view.col].to_f64())),
        Operand::FourBit { weight, transposed, .. } => fill(&|i, j| {
            let flat = if *transposed { j * weight.cols + i } else { i * weight.cols + j };
            let index =
                if flat % 2 == 0 { weight.packed[flat / 2] >> 4 } else { weight.packed[flat / 2] & 15 };
            T::of(f64::from(weight.code[usize::from(index)] * weight.absmax[flat / weight.block]))
        }),
    }
}

/// Calls the `gemm` crate after bounds checks. It computes f64 products, attention in f32, and skinny products in
/// f32.
#[allow(clippy::too_many_arguments)]
fn library_gemm<T: Real>(
    [m, n, k]: [usize; 3],
    alpha: T,
    a: View<T>,
    b: View<T>,
    beta: T,
    c: &mut [T],
    c_row: usize,
    parallelism: Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    let reach = |rows: usize, cols: usize, row: usize, col: usize| (rows - 1) * row + (cols - 1) * col + 1;
    assert!(c_row >= n && c.len() >= reach(m, n, c_row, 1), "output slice too short");
    assert!(k == 0 || a.data.len() >= reach(m, k, a.row, a.col), "left slice too short");
    assert!(k == 0 || b.data.len() >= reach(k, n, b.row, b.col), "right slice too short");
    // SAFETY: the asserts above bound every element that the call touches, and `c` is borrowed mutably. The crate
    // computes `c = alpha * c + beta * a b`, so its alpha is hone's beta.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row as isize,
            beta != T::ZERO,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Lanes of sums and maxima. Lanes make vector code, and a smaller rounding error than one running sum.
const LANES: usize = 16;

#[inline(always)]
fn fold_lanes<T: Real>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            let other = lanes[i + width];
            lanes[i] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Returns the sum of the elements.
#[inline(always)]
pub fn sum<T: Real>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [T::ZERO; LANES];
    for x in chunks {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    rest.iter().fold(
        fold_lanes(lanes),
        #[inline(always)]
        |sum, &x| sum + x,
    )
}

/// Returns the sum of x * y.
#[inline(always)]
pub fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut lanes = [T::ZERO; LANES];
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for i in 0..LANES {
            lanes[i] = x[i].fma(y[i], lanes[i]);
        }
    }
    x_rest.iter().zip(y_rest).fold(
        fold_lanes(lanes),
        #[inline(always)]
        |sum, (&x, &y)| sum + x * y,
    )
}

/// Returns the sum of x * y * z.
#[inline(always)]
pub fn dot3<T: Real>(x: &[T], y: &[T], z: &[T]) -> T {
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let (z_chunks, z_rest) = z.as_chunks::<LANES>();
    let mut lanes = [T::ZERO; LANES];
    for ((x, y), z) in x_chunks.iter().zip(y_chunks).zip(z_chunks) {
        for i in 0..LANES {
            lanes[i] = (x[i] * y[i]).fma(z[i], lanes[i]);
        }
    }
    let rest = x_rest.iter().zip(y_rest).zip(z_rest);
    rest.fold(
        fold_lanes(lanes),
        #[inline(always)]
        |sum, ((&x, &y), &z)| sum + x * y * z,
    )
}

/// Returns the largest value, or NaN if there is one. `x` must not be empty.
#[inline(always)]
pub fn largest<T: Real>(x: &[T]) -> T {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [x[0]; LANES];
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = x[i].larger(lanes[i]);
        }
    }
    lanes.iter().chain(rest).fold(
        x[0],
        #[inline(always)]
        |largest, &value| value.larger(largest),
    )
}

/// Runs `body` with `T` bound to the tensor's number type. Types other than f32 and f64 are an error.
#[macro_export]
macro_rules! with_real {
    ($tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => candle_core::bail!("no {other:?} arithmetic on a CPU: expected f32 or f64"),
        }
    };
}

/// The elements of a contiguous CPU tensor, for reading.
pub struct Read<'a, T> {
    storage: candle_core::StorageRef<'a>,
    range: std::ops::Range<usize>,
    kind: std::marker::PhantomData<T>,
}

/// Opens a contiguous CPU tensor for reading. The result derefs to a slice.
pub fn read<T: WithDType>(tensor: &Tensor) -> Result<Read<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<T>().map(|_| ())?,
        _ => bail!("expected a tensor on the CPU"),
    }
    Ok(Read { storage, range: from..to, kind: std::marker::PhantomData })
}

impl<T: WithDType> std::ops::Deref for Read<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(cpu) => &cpu.as_slice::<T>().expect("checked when opened")[self.range.clone()],
            _ => unreachable!("checked when opened"),
        }
    }
}

/// Changes the elements of a contiguous tensor in place. Nothing else may view the same storage at that time:
/// candle guards storages by a lock, so a `Read` of the same storage held during this call would deadlock.
pub fn edit<T: Stored, R>(tensor: &Tensor, write: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    struct Edit<F, R>(RefCell<(Option<F>, Option<R>)>, std::marker::PhantomData<R>);
    struct Typed<T, F, R>(Edit<F, R>, std::marker::PhantomData<T>);
    impl<T: Stored, F: FnOnce(&mut [T]) -> R, R> InplaceOp1 for Typed<T, F, R> {
        fn name(&self) -> &'static str {
            "edit"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let Some((from, to)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
            let mut cell = self.0.0.borrow_mut();
            let write = cell.0.take().expect("the operation runs once");
            cell.1 = Some(write(&mut T::slice_mut(storage)?[from..to]));
            Ok(())
        }
    }
    let op =
        Typed(Edit(RefCell::new((Some(write), None)), std::marker::PhantomData), std::marker::PhantomData);
    tensor.inplace_op1(&op)?;
    Ok(op.0.0.into_inner().1.expect("the operation ran"))
}

/// Makes a CPU tensor from elements.
pub fn tensor<T: WithDType>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &candle_core::Device::Cpu)
}

/// Returns the elements of any CPU tensor as f64, for tests and small sums.
pub fn to_f64(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Compiles the closure once for each vector width and runs the widest version that this machine supports.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_keeps_the_special_values() {
        let mut worst = 0f64;
        for i in -873_000..883_000 {
            let x = i as f32 * 1e-4;
            let exact = (x as f64).exp();
            let ulp = (exact as f32).next_up() as f64 - exact as f32 as f64;
            worst = worst.max((Real::exp(x) as f64 - exact).abs() / ulp);
        }
        assert!(worst < 2.0, "worst error {worst} ulp");
        assert_eq!(Real::exp(0f32), 1.0);
        assert!(Real::exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(Real::exp(f32::INFINITY) > 2e38);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    /// TOLERANCE: half an ulp of 1 is 6e-8; the largest errors found are 1e-7 and 1.8e-7.
    #[test]
    fn tanh_and_erf_are_as_close_as_f32_allows() {
        for i in -1_000_000..1_000_000 {
            let x = i as f32 * 1e-5;
            let errors = [
                Real::tanh(x) as f64 - (x as f64).tanh(),
                Real::erf(x) as f64 - candle_core::cpu::erf::erf_f64(x as f64),
            ];
            for (name, error) in ["tanh", "erf"].iter().zip(errors) {
                assert!(error.abs() < 2.4e-7 * (x.abs() as f64).min(1.0) + 1e-30, "{name}({x}): {error}");
            }
        }
        assert!(Real::tanh(f32::NAN).is_nan() && Real::erf(f32::NAN).is_nan());
        assert_eq!((Real::tanh(f32::INFINITY), Real::erf(f32::NEG_INFINITY)), (1.0, -1.0));
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for length in [1usize, 15, 16, 17, 100] {
            let x: Vec<f64> = (0..length).map(|i| ((i * 37 + 11) % 101) as f64 - 50.0).collect();
            let y: Vec<f64> = x.iter().map(|x| x * 0.5 + 1.0).collect();
            assert_eq!(sum(&x), x.iter().sum::<f64>());
            assert_eq!(dot(&x, &y), x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>());
            assert_eq!(dot3(&x, &y, &x), x.iter().zip(&y).map(|(x, y)| x * y * x).sum::<f64>());
            assert_eq!(largest(&x), x.iter().copied().fold(f64::MIN, f64::max));
            let mut bad = x.clone();
            bad[length - 1] = f64::NAN;
            assert!(largest(&bad).is_nan());
        }
    }

    #[test]
    fn edit_changes_a_view_of_a_flat_tensor() -> Result<()> {
        let flat = tensor(vec![0f32; 6], 6)?;
        let middle = flat.narrow(0, 2, 2)?;
        edit(&middle, |m: &mut [f32]| m.fill(1.0))?;
        assert_eq!(flat.to_vec1::<f32>()?, [0., 0., 1., 1., 0., 0.]);
        Ok(())
    }
}

//! Matrix product on the CPU: two strided views, also of 4-bit weights -> `c = alpha * a * b + beta * c` in f32.
//!
//! One driver (`drive`) cuts the product into 32x32 blocks of `c`. A kernel (`amx`, `avx512`, `portable`) is a
//! table of functions that pack operands into panels and multiply two panels. Operands are packed from their stored
//! form, so a frozen 4-bit weight is expanded one panel at a time and never as a whole.
//!
//! An element of `c` is always summed in the same order: its bits depend on the kernel and on `k`, not on the
//! number of threads, the run, or the other rows. If a row or column holds a NaN or an infinity, its products are
//! not finite.

mod four_bit;
mod source;
mod buffer;
mod drive;
mod portable;
mod few;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod pack_bf16;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

pub use few::{Nested, Weight, few, rounded};
pub use four_bit::{FourBitView, Rounding, dequantize};
use half::bf16;

use crate::facts::Precision;

/// A matrix in its stored form. Strides count elements; a transpose is a view with swapped strides.
#[derive(Clone, Copy)]
pub enum Matrix<'a> {
    /// Values in f32.
    F32 {
        /// The elements; element (i, j) is `data[i * row_stride + j * col_stride]`.
        data: &'a [f32],
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Distance between rows.
        row_stride: usize,
        /// Distance between columns.
        col_stride: usize,
    },
    /// Values in bf16.
    Bf16 {
        /// The elements; element (i, j) is `data[i * row_stride + j * col_stride]`.
        data: &'a [bf16],
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Distance between rows.
        row_stride: usize,
        /// Distance between columns.
        col_stride: usize,
    },
    /// A frozen 4-bit weight.
    FourBit {
        /// The weight [rows, cols].
        weight: FourBitView<'a>,
        /// Whether the matrix is the transpose [cols, rows].
        transposed: bool,
    },
}

impl<'a> Matrix<'a> {
    /// Returns a dense row-major matrix [rows, cols] in f32.
    pub fn f32(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Matrix::F32 { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Returns a dense row-major matrix [rows, cols] in bf16.
    pub fn bf16(data: &'a [bf16], rows: usize, cols: usize) -> Self {
        Matrix::Bf16 { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Returns a 4-bit weight [rows, cols].
    pub fn four_bit(weight: FourBitView<'a>) -> Self {
        Matrix::FourBit { weight, transposed: false }
    }

    /// Returns the transpose of this matrix over the same memory.
    pub fn t(self) -> Self {
        match self {
            Matrix::F32 { data, rows, cols, row_stride, col_stride } => {
                Matrix::F32 { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
            }
            Matrix::Bf16 { data, rows, cols, row_stride, col_stride } => {
                Matrix::Bf16 { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
            }
            Matrix::FourBit { weight, transposed } => Matrix::FourBit { weight, transposed: !transposed },
        }
    }

    /// (rows, cols)
    pub fn shape(&self) -> (usize, usize) {
        match *self {
            Matrix::F32 { rows, cols, .. } | Matrix::Bf16 { rows, cols, .. } => (rows, cols),
            Matrix::FourBit { weight, transposed: false } => (weight.rows, weight.cols),
            Matrix::FourBit { weight, transposed: true } => (weight.cols, weight.rows),
        }
    }

    /// Panics unless every element that the shape implies lies inside the data. The kernels rely on this check.
    fn check(&self) {
        let inside = |len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize| {
            let last =
                || (rows - 1).checked_mul(row_stride)?.checked_add((cols - 1).checked_mul(col_stride)?);
            rows == 0 || cols == 0 || last().is_some_and(|last| last < len)
        };
        let fits = match *self {
            Matrix::F32 { data, rows, cols, row_stride, col_stride } => {
                inside(data.len(), rows, cols, row_stride, col_stride)
            }
            Matrix::Bf16 { data, rows, cols, row_stride, col_stride } => {
                inside(data.len(), rows, cols, row_stride, col_stride)
            }
            Matrix::FourBit { weight, .. } => return weight.check(),
        };
        assert!(fits, "matrix view {:?} reaches outside its data", self.shape());
    }
}

/// `c[m, n] = alpha * a[m, k] * b[k, n] + beta * c[m, n]` on the threads of the current rayon pool.
///
/// `c` is row-major with `c_row_stride` elements from row to row. With `beta == 0` it is only written, never read.
/// Panics if a shape or a length does not fit.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &Matrix,
    b: &Matrix,
    beta: f32,
    c: &mut [f32],
    c_row_stride: usize,
    precision: Precision,
) {
    let products = m.saturating_mul(n).saturating_mul(k);
    let threads = if products < PARALLEL_PRODUCTS_MIN { 1 } else { rayon::current_num_threads() };
    let precision = precision.beside();
    product(kernel(precision), threads, [m, n, k], alpha, a, b, beta, c, c_row_stride, precision);
}

/// `gemm` on the calling thread alone, for tasks that already run in parallel (attention heads). The bits are those
/// of `gemm`. It allocates nothing once the thread's buffers have grown.
#[allow(clippy::too_many_arguments)]
pub fn gemm_serial(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &Matrix,
    b: &Matrix,
    beta: f32,
    c: &mut [f32],
    c_row_stride: usize,
    precision: Precision,
) {
    let precision = precision.beside();
    product(kernel(precision), 1, [m, n, k], alpha, a, b, beta, c, c_row_stride, precision);
}

/// Returns the name of the kernel that multiplies on this machine, for the log: "amx", "avx512-bf16", "avx512", "avx2"
/// or "portable".
pub fn kernel_name(precision: Precision) -> &'static str {
    kernel(precision.beside()).name
}

/// Number of multiplications below which waking a second thread costs more than it saves.
const PARALLEL_PRODUCTS_MIN: usize = 1 << 22;

#[allow(clippy::too_many_arguments)]
fn product(
    kernel: &drive::Kernel,
    threads: usize,
    [m, n, k]: [usize; 3],
    alpha: f32,
    a: &Matrix,
    b: &Matrix,
    beta: f32,
    c: &mut [f32],
    c_row_stride: usize,
    precision: Precision,
) {
    assert_eq!(a.shape(), (m, k), "a is not [m, k]");
    assert_eq!(b.shape(), (k, n), "b is not [k, n]");
    a.check();
    b.check();
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= c_row_stride, "rows of c overlap: {n} columns, {c_row_stride} apart");
    let last = (m - 1).checked_mul(c_row_stride).and_then(|start| start.checked_add(n));
    assert!(last.is_some_and(|last| last <= c.len()), "c[{m}, {n}] reaches outside its data");
    let c = drive::Target { data: c.as_mut_ptr(), row_stride: c_row_stride, alpha, beta };
    drive::run(kernel, threads, [m, n, k], a, b, c, precision);
}

/// Name of a kernel that benchmarks run instead of the fastest one, so that a machine also measures for older ones.
const KERNEL_VARIABLE: &str = "HONE_BENCH_GEMM";

/// Returns the fastest kernel of this machine, chosen once.
fn kernel(precision: Precision) -> &'static drive::Kernel {
    static CHOSEN: [OnceLock<&'static drive::Kernel>; 2] = [OnceLock::new(), OnceLock::new()];
    CHOSEN[precision as usize].get_or_init(|| {
        let kernels = kernels(precision);
        let wanted = std::env::var(KERNEL_VARIABLE).unwrap_or_default();
        let named = kernels.iter().find(|kernel| kernel.name == wanted);
        named.or(kernels.first()).copied().expect("the portable kernel runs everywhere")
    })
}

/// Returns every kernel that this machine can run at this precision, fastest first.
fn kernels(precision: Precision) -> Vec<&'static drive::Kernel> {
    let mut found: Vec<&'static drive::Kernel> = Vec::new();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::permitted() {
        found.push(&amx::KERNEL);
    }
    #[cfg(target_arch = "x86_64")]
    {
        let pairs = precision == Precision::Bf16 && avx512::has_bf16();
        if pairs && avx512::pairs_are_fast() {
            found.push(&avx512::BF16);
        }
        if avx512::has_f32() {
            found.push(&avx512::F32);
        }
        if pairs && !avx512::pairs_are_fast() {
            found.push(&avx512::BF16);
        }
        if avx2::available() {
            found.push(&avx2::KERNEL);
        }
    }
    let _ = precision;
    found.push(&portable::KERNEL);
    found
}

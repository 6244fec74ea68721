//! Matrix products by cublasLt: row-major matrices inside tensors, f32 or bf16 inputs, f32 sums. cuBLAS takes the
//! shapes for which cublasLt has no algorithm.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{DType, Result, Tensor, bail};

use super::lt;
use crate::ops::change::Change;

/// A matrix inside a tensor: element (i, j) is at `at + i * stride + j`, or at `at + j * stride + i` if transposed.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// The tensor.
    pub tensor: &'a Tensor,
    /// Index of the first element.
    pub at: usize,
    /// Distance between rows in the tensor, in elements.
    pub stride: usize,
    /// Whether the matrix is the transpose of the stored one.
    pub transposed: bool,
}

impl<'a> Matrix<'a> {
    /// Returns a matrix stored row by row from element `at` on.
    pub fn rows(tensor: &'a Tensor, at: usize, stride: usize) -> Matrix<'a> {
        Matrix { tensor, at, stride, transposed: false }
    }

    /// Returns the transpose of this matrix.
    pub fn transposed(self) -> Matrix<'a> {
        Matrix { transposed: !self.transposed, ..self }
    }
}

/// `c[m,n] = alpha * a[m,k] b[k,n] + beta * c`. a and b have the same type, f32 or bf16; c has that type or f32.
pub fn product(mnk: [usize; 3], alpha: f64, a: Matrix, b: Matrix, beta: f64, c: Matrix) -> Result<()> {
    match check(mnk, a, b, c)? {
        true if Change::Algorithms.is_on() && lt_product(mnk, alpha, a, b, beta, [c, c])? => Ok(()),
        true => blas_product(mnk, alpha, a, b, beta, c),
        false => Ok(()),
    }
}

/// `d[m,n] = alpha * a[m,k] b[k,n] + c`. c and d have one type, and lie in tensors that share no memory.
pub fn product_onto(mnk: [usize; 3], alpha: f64, a: Matrix, b: Matrix, c: Matrix, d: Matrix) -> Result<()> {
    if !check(mnk, a, b, c)? || !check(mnk, a, b, d)? {
        return Ok(());
    }
    if c.tensor.dtype() != d.tensor.dtype() {
        bail!("a sum of {:?} and {:?}", c.tensor.dtype(), d.tensor.dtype());
    }
    if Change::Onto.is_on() && lt_product(mnk, alpha, a, b, 1.0, [c, d])? {
        return Ok(());
    }
    if (c.at, c.stride, c.tensor.elem_count()) != (d.at, d.stride, d.tensor.elem_count()) {
        bail!("a copy of a matrix in a tensor {:?} to one in {:?}", c.tensor.dims(), d.tensor.dims());
    }
    super::copy(c.tensor, d.tensor)?;
    product(mnk, alpha, a, b, 1.0, d)
}

/// A matrix in E4M3, row by row, and perhaps a scale for each row.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    /// The bits of the codes, u8 [rows, k].
    pub bits: &'a Tensor,
    /// f32 `[rows]`. Without them the sums are those of the bare numbers.
    pub scales: Option<&'a Tensor>,
}

/// `d[m,n] = alpha * a[m,k] b[n,k]^T + beta * c`, each row of a and of b times its scale if they have any. c is d, or
/// has its shape and type in another tensor. `fast`: sums may be less exact. False: the library has no such product,
/// and nothing was done.
pub fn product_of_codes(
    alpha: f64,
    [a, b]: [Codes; 2],
    beta: f64,
    [c, d]: [Matrix; 2],
    fast: bool,
) -> Result<bool> {
    let ((m, k), (n, b_cols)) = (a.bits.dims2()?, b.bits.dims2()?);
    for (codes, rows) in [(a, m), (b, n)] {
        if codes.bits.dtype() != DType::U8 || b_cols != k {
            bail!("codes {:?} of {:?}, rows of {k}", codes.bits.dims(), codes.bits.dtype());
        }
        if codes.scales.is_some_and(|scales| scales.dtype() != DType::F32 || scales.elem_count() != rows) {
            bail!("scales of {rows} rows: {:?}", codes.scales);
        }
    }
    data_type(d.tensor)?;
    if c.tensor.dtype() != d.tensor.dtype() || c.transposed || d.transposed {
        bail!("a sum of {:?} and {:?}", c.tensor.dtype(), d.tensor.dtype());
    }
    if m == 0 || n == 0 {
        return Ok(true);
    }
    reach(c, m, n)?;
    reach(d, m, n)?;
    let address = |matrix: Matrix| super::address(matrix.tensor, matrix.at);
    let addresses = [super::address(a.bits, 0)?, super::address(b.bits, 0)?, address(c)?, address(d)?];
    let scales = match (a.scales, b.scales) {
        (Some(of_a), Some(of_b)) => Some([super::address(of_a, 0)?, super::address(of_b, 0)?]),
        _ => None,
    };
    let (strides, types) = ([k, k, c.stride, d.stride], [DType::F8E4M3, d.tensor.dtype()]);
    let mut shape = lt::Shape::new([m, n, k], [false, true], strides, types, addresses);
    shape.eight_bits = Some(lt::EightBits { scaled: scales.is_some(), fast });
    let device = super::device(d.tensor)?;
    // SAFETY: every element of the four matrices and of the scales was bounded above; c is d, or in another tensor.
    let done = unsafe { lt::multiply(device, &shape, alpha as f32, beta as f32, addresses, scales) }?;
    if done {
        super::count_launch();
    }
    Ok(done)
}

/// Refuses matrices that reach beyond their tensors, and types that do not fit. False: the result is empty.
fn check([m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: Matrix) -> Result<bool> {
    assert!(!c.transposed, "the result lies row by row");
    data_type(c.tensor)?;
    if data_type(a.tensor)? != data_type(b.tensor)? {
        bail!("a product of {:?} with {:?}", a.tensor.dtype(), b.tensor.dtype());
    }
    if m == 0 || n == 0 {
        return Ok(false);
    }
    reach(a, m, k)?;
    reach(b, k, n)?;
    reach(c, m, n)?;
    Ok(true)
}

/// `d = alpha * a b + beta * c` by cublasLt. False if it has no algorithm for this shape.
fn lt_product(
    mnk: [usize; 3],
    alpha: f64,
    a: Matrix,
    b: Matrix,
    beta: f64,
    [c, d]: [Matrix; 2],
) -> Result<bool> {
    if mnk[2] == 0 {
        return Ok(false);
    }
    let address = |matrix: Matrix| super::address(matrix.tensor, matrix.at);
    let addresses = [address(a)?, address(b)?, address(c)?, address(d)?];
    let strides = [a.stride, b.stride, c.stride, d.stride];
    let types = [a.tensor.dtype(), c.tensor.dtype()];
    let shape = lt::Shape::new(mnk, [a.transposed, b.transposed], strides, types, addresses);
    let device = super::device(d.tensor)?;
    // SAFETY: `check` has bounded every element of the four matrices; c is d, or in another tensor.
    let done = unsafe { lt::multiply(device, &shape, alpha as f32, beta as f32, addresses, None) }?;
    if done {
        super::count_launch();
    }
    Ok(done)
}

/// Does `product` by cuBLAS, which chooses an algorithm again in each call.
fn blas_product([m, n, k]: [usize; 3], alpha: f64, a: Matrix, b: Matrix, beta: f64, c: Matrix) -> Result<()> {
    let (input, output) = (data_type(a.tensor)?, data_type(c.tensor)?);
    let (alpha, beta) = (alpha as f32, beta as f32);
    let operation = |matrix: Matrix| match matrix.transposed {
        false => sys::cublasOperation_t::CUBLAS_OP_N,
        true => sys::cublasOperation_t::CUBLAS_OP_T,
    };
    let pointer = |matrix: Matrix| {
        Ok::<_, candle_core::Error>(super::address(matrix.tensor, matrix.at)? as *mut c_void)
    };
    super::count_launch();
    let blas = super::device(c.tensor)?.cublas_handle();
    // cuBLAS stores matrices by columns, so it computes the transposed product: c^T = b^T a^T.
    // SAFETY: `check` has bounded every element of the three matrices; the handle's stream is the device's.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            n as i32,
            m as i32,
            k as i32,
            (&raw const alpha).cast(),
            pointer(b)?,
            input,
            b.stride as i32,
            pointer(a)?,
            input,
            a.stride as i32,
            (&raw const beta).cast(),
            pointer(c)?,
            output,
            c.stride as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|error| candle_core::Error::Msg(format!("cuBLAS, product {m} x {n} x {k}: {error:?}")))
}

fn data_type(tensor: &Tensor) -> Result<sys::cudaDataType> {
    match tensor.dtype() {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        other => bail!("no product of {other:?} on a GPU"),
    }
}

/// Refuses a matrix that reaches beyond its tensor.
fn reach(matrix: Matrix, rows: usize, cols: usize) -> Result<()> {
    let (rows, cols) = if matrix.transposed { (cols, rows) } else { (rows, cols) };
    let end = matrix.at + rows.saturating_sub(1) * matrix.stride + cols;
    match cols <= matrix.stride
        && (rows == 0 || end <= matrix.tensor.elem_count())
        && matrix.stride <= i32::MAX as usize
    {
        true => Ok(()),
        false => bail!(
            "a matrix {rows} x {cols} at {} in rows of {} of a tensor {:?}",
            matrix.at,
            matrix.stride,
            matrix.tensor.dims()
        ),
    }
}

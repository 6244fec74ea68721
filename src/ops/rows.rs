//! Rows copied out of and into a matrix: the supervised rows before the output head, and their gradient after it.
//! Also sums of matrices and a change of storage type.

use candle_core::{DType, Device, Result, Tensor};

use super::cpu;
use crate::with_real;

/// An index that fills a list up on a GPU: it stands for no row.
pub const NO_ROW: u32 = u32::MAX;

/// Row numbers, on the device of the matrices.
pub enum Index<'a> {
    /// Numbers on the host.
    Here(&'a [u32]),
    /// Numbers on a GPU.
    #[cfg(feature = "cuda")]
    There(Tensor),
}

impl Index<'_> {
    /// Copies numbers of rows of matrices with `rows` rows to their device. On a GPU some may be `NO_ROW`.
    pub fn send<'a>(list: &'a [u32], rows: usize, device: &Device) -> Result<Index<'a>> {
        let fills = |row: u32| row == NO_ROW && device.is_cuda();
        assert!(list.iter().all(|&row| (row as usize) < rows || fills(row)), "rows below {rows}");
        #[cfg(feature = "cuda")]
        if device.is_cuda() && !list.is_empty() {
            return Ok(Index::There(super::cuda::upload(list, device)?));
        }
        Ok(Index::Here(list))
    }

    /// Returns the number of rows.
    pub fn count(&self) -> usize {
        match self {
            Index::Here(list) => list.len(),
            #[cfg(feature = "cuda")]
            Index::There(list) => list.elem_count(),
        }
    }
}

/// x [T, C] -> its rows `index`, [rows, C].
pub fn gather(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    gather_at(x, &Index::send(index, x.dim(0)?, x.device())?)
}

/// Does `gather` with numbers that lie on the device. For `NO_ROW` it takes some row.
pub fn gather_at(x: &Tensor, index: &Index) -> Result<Tensor> {
    let (_, width) = x.dims2()?;
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match))]
    let index = match index {
        #[cfg(feature = "cuda")]
        Index::There(index) => return gpu::gather(x, index),
        #[cfg(feature = "cuda")]
        Index::Here(_) if x.device().is_cuda() => return super::unwritten((0, width), x.dtype(), x.device()),
        Index::Here(index) => index,
    };
    with_real!(x, T => {
        let x = &*cpu::read::<T>(x)?;
        let mut y = Vec::with_capacity(index.len() * width);
        index.iter().for_each(|&row| y.extend_from_slice(&x[row as usize * width..][..width]));
        cpu::tensor(y, (index.len(), width))
    })
}

/// Returns the transpose of `gather` for distinct rows: a matrix [T, C] of zeros with the rows of `y` at `index`.
pub fn scatter(y: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
    scatter_beside(y, index, rows, 0)
}

/// Does `scatter` into the first columns of a matrix [T, C + spare] of zeros. Spare columns need a GPU.
pub fn scatter_beside(y: &Tensor, index: &[u32], rows: usize, spare: usize) -> Result<Tensor> {
    scatter_at(y, &Index::send(index, rows, y.device())?, rows, spare)
}

/// Does `scatter_beside` with numbers that lie on the device. Rows for `NO_ROW` are left out.
pub fn scatter_at(y: &Tensor, index: &Index, rows: usize, spare: usize) -> Result<Tensor> {
    let (count, width) = y.dims2()?;
    assert_eq!(index.count(), count, "one number for each row");
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        return gpu::scatter(y, index, rows, spare);
    }
    #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
    let Index::Here(index) = index else { candle_core::bail!("row numbers on another device") };
    let index = *index;
    assert_eq!(spare, 0, "spare columns on a CPU");
    with_real!(y, T => {
        let y = &*cpu::read::<T>(y)?;
        let mut x = vec![<T as cpu::Real>::ZERO; rows * width];
        for (&row, values) in index.iter().zip(y.chunks(width)) {
            x[row as usize * width..][..width].copy_from_slice(values);
        }
        cpu::tensor(x, (rows, width))
    })
}

/// Copies columns at..at+width of x [T, C] into a tensor [T, width] of its own.
pub fn columns(x: &Tensor, at: usize, width: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let y = super::unwritten((x.dim(0)?, width), x.dtype(), x.device())?;
        gpu::place((x, at), &y, 0, width)?;
        return Ok(y);
    }
    x.narrow(1, at, width)?.force_contiguous()
}

/// Returns x with `spare` more columns, which are not written; x itself without them. Spare columns need a GPU.
pub fn beside(x: &Tensor, spare: usize) -> Result<Tensor> {
    if spare == 0 {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let wide = super::unwritten((x.dim(0)?, x.dim(1)? + spare), x.dtype(), x.device())?;
        place(x, &wide, 0)?;
        return Ok(wide);
    }
    candle_core::bail!("spare columns on a CPU")
}

/// Copies x [rows, C] on a GPU into a wider matrix, from its element `at` on.
#[cfg(feature = "cuda")]
pub fn place(x: &Tensor, to: &Tensor, at: usize) -> Result<()> {
    gpu::place((x, 0), to, at, x.dim(1)?)
}

/// `x += y` in place; both have the same shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<()> {
    assert_eq!(x.dims(), y.dims(), "shapes of a sum");
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return gpu::add(x, y);
    }
    with_real!(x, T => {
        let y = &*cpu::read::<T>(y)?;
        cpu::edit(x, |x: &mut [T]| x.iter_mut().zip(y).for_each(|(x, &y)| *x += y))
    })
}

/// Returns x in another storage type, rounded to nearest; x itself if it already has that type.
pub fn convert(x: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && x.dtype() != dtype {
        return gpu::convert(x, dtype);
    }
    x.to_dtype(dtype)
}

/// The launches of `kernels/rows.cu`: one block per row, or eight elements per thread.
#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};

    const THREADS: usize = 256;
    const EIGHT: usize = 8;

    /// Returns rows of `x` by index.
    pub fn gather(x: &Tensor, index: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        let y = crate::ops::unwritten((index.elem_count(), width), x.dtype(), x.device())?;
        moved("gather", x, index, &y)?;
        Ok(y)
    }

    /// Returns rows of `y` at their index among `rows` rows; everything else is zero.
    pub fn scatter(y: &Tensor, index: &Index, rows: usize, spare: usize) -> Result<Tensor> {
        let (_, width) = y.dims2()?;
        let x = Tensor::zeros((rows, width + spare), y.dtype(), y.device())?;
        if let Index::There(index) = index {
            moved("scatter", y, index, &x)?;
        }
        Ok(x)
    }

    fn moved(name: &str, from: &Tensor, index: &Tensor, to: &Tensor) -> Result<()> {
        let launch = Launch::new(from, "rows", name)?.tensor(from).of(DType::U32, index).tensor(to);
        let launch = launch.int(from.dim(1)?).int(to.dim(1)?);
        launch.launch((index.elem_count(), 1, 1), 128, 0)
    }

    /// Copies `width` columns of `x`, from column `from` on, into rows of `y`, from its element `at` on.
    pub fn place((x, from): (&Tensor, usize), y: &Tensor, at: usize, width: usize) -> Result<()> {
        let ((rows, x_stride), (_, y_stride)) = (x.dims2()?, y.dims2()?);
        let end = at + rows.saturating_sub(1) * y_stride + width;
        assert!(
            from + width <= x_stride && (rows == 0 || end <= y.elem_count()),
            "{width} columns of {x_stride}, at {from}, into {y_stride} at {at}"
        );
        let aligned = [from, at, x_stride, y_stride].iter().all(|number| number.is_multiple_of(EIGHT));
        let launch = Launch::new(x, "rows", "columns")?.tensor_at(x, from).tensor_at(y, at);
        let launch = launch.int(x_stride).int(y_stride).int(width).int(usize::from(aligned));
        launch.launch((rows, 1, 1), 128, 0)
    }

    /// Adds `y` to `x`, in place.
    pub fn add(x: &Tensor, y: &Tensor) -> Result<()> {
        let count = x.elem_count();
        let launch = Launch::new(x, "rows", "add")?.tensor(x).tensor(y).long(count as u64);
        launch.launch((count.div_ceil(THREADS * EIGHT), 1, 1), THREADS, 0)
    }

    /// Returns `x` in another type.
    pub fn convert(x: &Tensor, dtype: DType) -> Result<Tensor> {
        let (y, count) = (crate::ops::unwritten(x.shape(), dtype, x.device())?, x.elem_count());
        let name = format!("convert_{}", cuda::suffix(x.dtype())?);
        let launch = Launch::new(&y, "rows", &name)?.of(x.dtype(), x).tensor(&y).long(count as u64);
        launch.launch((count.div_ceil(THREADS * EIGHT), 1, 1), THREADS, 0)?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn the_kernels_equal_the_host() -> Result<()> {
        judge::on_gpu(|gpu| {
            for (rows, width) in [(1, 1), (7, 5), (33, 96), (3, 1000)] {
                let (x, y) = (gpu.random((rows, width), 1)?, gpu.random((rows, width), 2)?);
                let index: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).collect();
                let picked = gather(&gpu.put(&x)?, &index)?;
                gpu.same(&picked, &gather(&x, &index)?)?;
                gpu.same(&scatter(&picked, &index, rows)?, &scatter(&gather(&x, &index)?, &index, rows)?)?;
                let half = width.div_ceil(2);
                for at in [0, width - half] {
                    gpu.same(&columns(&gpu.put(&x)?, at, half)?, &columns(&x, at, half)?)?;
                }
                placed(gpu, &x)?;
                let beside = scatter_beside(&picked, &index, rows, 8)?;
                let expected = scatter(&gather(&x, &index)?, &index, rows)?.pad_with_zeros(1, 0, 8)?;
                gpu.same(&beside, &expected)?;
                let sum = gpu.put(&x)?;
                add(&sum, &gpu.put(&y)?)?;
                gpu.same(&sum, &(x.as_tensor() + y.as_tensor())?)?;
                for dtype in [DType::F32, DType::BF16] {
                    // The GPU's conversion equals the host's to the last bit.
                    let expected = x.to_dtype(gpu.dtype)?.to_dtype(dtype)?;
                    gpu.within(0.0, &convert(&gpu.put(&x)?, dtype)?, &expected)?;
                }
            }
            Ok(())
        })
    }

    /// Checks the change of a matrix inside another one, whose other values must stay as they are.
    #[cfg(feature = "cuda")]
    fn placed(gpu: &judge::Gpu, x: &Tensor) -> Result<()> {
        let (rows, width) = x.dims2()?;
        for (above, left, right) in [(0, 0, 8), (1, 8, 8), (2, 3, 0)] {
            let wide = gpu.random((above + rows, left + width + right), 3)?;
            let found = gpu.put(&wide)?;
            place(&gpu.put(x)?, &found, above * (left + width + right) + left)?;
            let below = wide.narrow(0, above, rows)?;
            let row =
                Tensor::cat(&[&below.narrow(1, 0, left)?, x, &below.narrow(1, left + width, right)?], 1)?;
            gpu.within(0.0, &found, &Tensor::cat(&[&wide.narrow(0, 0, above)?, &row], 0)?)?;
        }
        Ok(())
    }

    #[cfg(not(feature = "cuda"))]
    fn placed(_: &judge::Gpu, _: &Tensor) -> Result<()> {
        Ok(())
    }
}

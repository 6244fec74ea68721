//! A matrix on the device -> its tensor map, by which Hopper's kernels copy boxes of it (`kernels/prim_hopper.cuh`).

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Result, Tensor, bail};

/// A map that the driver encodes (`CUtensorMap`): 128 bytes that are a kernel's parameter.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Bytes of the parameter.
    pub const BYTES: usize = 128;

    /// Returns the map of a contiguous bf16 matrix, for boxes of `rows` rows and `columns` columns. A box's row of 64
    /// or 128 bytes is one span of the swizzle.
    ///
    /// # Errors
    /// Another type, a box of another width, or a matrix whose rows are no multiples of 16 bytes.
    pub fn of(matrix: &Tensor, rows: usize, columns: usize) -> Result<TensorMap> {
        use sys::CUtensorMapSwizzle_enum as Swizzle;
        let (height, width) = matrix.dims2()?;
        let swizzle = match columns {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => bail!("a box of {columns} columns: expected 32 or 64"),
        };
        if matrix.dtype() != DType::BF16 {
            bail!("a tensor map of {:?}: expected bf16", matrix.dtype());
        }
        let device = super::device(matrix)?;
        device.cuda_stream().context().bind_to_thread().w()?;
        let mut map = TensorMap([0; 16]);
        let (sizes, stride) = ([width as u64, height as u64], [2 * width as u64]);
        let (boxes, steps) = ([columns as u32, rows as u32], [1u32, 1]);
        // SAFETY: the map is 128 bytes that may be written, aligned as the driver asks; the other pointers are to
        // arrays of as many numbers as a matrix has dimensions, or one fewer. The driver reads no memory of the
        // device.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map.0).cast(),
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                super::address(matrix, 0)? as *mut std::ffi::c_void,
                sizes.as_ptr(),
                stride.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .w()?;
        }
        Ok(map)
    }
}

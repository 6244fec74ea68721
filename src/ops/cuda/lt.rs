//! Products by cublasLt: `d = alpha * a b + beta * c`, where c and d may lie in different memory. For each shape the
//! library is asked for an algorithm once.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use sys::cublasLtMatmulDescAttributes_t as Attribute;
use sys::cublasLtMatmulPreferenceAttributes_t as Preference;

/// Shapes whose algorithms are remembered. Packed passes have many lengths; beyond this number all are forgotten.
const SHAPES_MAX: usize = 1 << 13;
/// Most bytes that an algorithm may work in. The library's guide advises so many for Hopper.
const WORKSPACE_BYTES_MAX: u64 = 32 << 20;
/// The alignment that the library assumes of addresses; allocations have it.
const ALIGNMENT_MAX: u32 = 256;

/// The facts on which the choice of an algorithm depends. a is [m, k], b [k, n], c and d [m, n], row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// m, n, k.
    pub mnk: [usize; 3],
    /// Whether a and b are transposes of the stored matrices.
    pub transposed: [bool; 2],
    /// Elements from a row to the next in memory, of a, b, c and d.
    pub strides: [usize; 4],
    /// The type of a and b, and that of c and d.
    pub types: [DType; 2],
    /// The treatment of matrices in 8 bits; `None` in other types.
    pub eight_bits: Option<EightBits>,
    /// Powers of two that divide the addresses of a, b, c and d.
    alignments: [u32; 4],
}

/// The form of a product of matrices in E4M3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EightBits {
    /// Whether the result is scaled by a number for each row of a and one for each column of b.
    pub scaled: bool,
    /// Whether the tensor cores add up with fewer bits before they add in f32, which is faster.
    pub fast: bool,
}

impl Shape {
    /// Returns a shape. Its `alignments` follow from the addresses of a, b, c and d.
    pub fn new(
        mnk: [usize; 3],
        transposed: [bool; 2],
        strides: [usize; 4],
        types: [DType; 2],
        addresses: [u64; 4],
    ) -> Shape {
        let alignment = |address: u64| ALIGNMENT_MAX.min(1 << address.trailing_zeros().min(8));
        Shape { mnk, transposed, strides, types, eight_bits: None, alignments: addresses.map(alignment) }
    }
}

/// The library's handle, and the algorithms that it chose.
struct Library {
    context: usize,
    handle: sys::cublasLtHandle_t,
    chosen: HashMap<Shape, Option<Chosen>>,
    /// Memory for the algorithms, as much as the greediest of them wants. All products run in one stream, so they
    /// share it.
    workspace: Option<Tensor>,
}

// SAFETY: a handle may be used on any thread, and the mutex around it lets one thread at a time use it.
unsafe impl Send for Library {}

/// An algorithm, and the descriptions that it was chosen for.
struct Chosen {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
}

static LIBRARY: Mutex<Option<Library>> = Mutex::new(None);

/// Returns the address of the memory that algorithms work in; 0: there is none. The products of a graph hold this
/// address.
pub(super) fn workspace() -> u64 {
    let library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = library.as_ref().and_then(|library| library.workspace.as_ref());
    memory.and_then(|memory| super::address(memory, 0).ok()).unwrap_or(0)
}

/// Queues the product. The matrices lie at these addresses: a, b, c, d. False: the library has no algorithm for the
/// shape, and nothing was done.
///
/// # Safety
/// The matrices lie inside live tensors of the device, and d overlaps neither a nor b; it is c or does not overlap it.
/// `scales` are the addresses of so many f32 as a has rows and b has columns, if the shape says that it is scaled.
pub(super) unsafe fn multiply(
    device: &CudaDevice,
    shape: &Shape,
    alpha: f32,
    beta: f32,
    [a, b, c, d]: [u64; 4],
    scales: Option<[u64; 2]>,
) -> Result<bool> {
    assert_eq!(scales.is_some(), shape.eight_bits.is_some_and(|eight| eight.scaled), "scales of a shape");
    let stream = device.cuda_stream();
    let mut library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    let library =
        Library::of(&mut library, stream.context().cu_ctx() as usize).map_err(|e| failed(shape, e))?;
    let handle = library.handle;
    let Some((chosen, workspace)) = library.choose(shape, scales, device)? else { return Ok(false) };
    chosen.scale(scales).map_err(|error| failed(shape, error))?;
    let (workspace, bytes) = match workspace {
        Some(memory) if chosen.workspace_bytes > 0 => (super::address(memory, 0)?, chosen.workspace_bytes),
        _ => (0, 0),
    };
    // The library stores matrices by columns, so it computes the transposed product: d^T = b^T a^T.
    let [left, right, from, to] = chosen.layouts;
    // SAFETY: the descriptions belong to this shape, the caller vouches for the addresses, and the workspace is a live
    // tensor of the same stream.
    let done = unsafe {
        result::matmul(
            handle,
            chosen.description,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            b as *const c_void,
            left,
            a as *const c_void,
            right,
            c as *const c_void,
            from,
            d as *mut c_void,
            to,
            &raw const chosen.algorithm,
            workspace as *mut c_void,
            bytes,
            stream.cu_stream().cast(),
        )
    };
    match done {
        Ok(()) => Ok(true),
        Err(error) if is_refusal(error) => {
            library.chosen.insert(*shape, None);
            Ok(false)
        }
        Err(error) => Err(failed(shape, error)),
    }
}

/// Returns whether the library does not take a shape, so that another way must be found.
fn is_refusal(CublasError(status): CublasError) -> bool {
    use sys::cublasStatus_t::{CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
    [CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED].contains(&status)
}

fn failed(shape: &Shape, error: CublasError) -> candle_core::Error {
    let [m, n, k] = shape.mnk;
    candle_core::Error::Msg(format!("cublasLt, product {m} x {n} x {k}: {error:?}"))
}

impl Library {
    /// Returns the library for this context. A second context begins again.
    fn of(place: &mut Option<Library>, context: usize) -> std::result::Result<&mut Library, CublasError> {
        if place.as_ref().is_none_or(|library| library.context != context) {
            let handle = result::create_handle()?;
            *place = Some(Library { context, handle, chosen: HashMap::new(), workspace: None });
        }
        Ok(place.as_mut().expect("it was just made"))
    }

    /// Returns the algorithm for a shape and the memory that it may work in; `None` if there is no algorithm.
    fn choose(
        &mut self,
        shape: &Shape,
        scales: Option<[u64; 2]>,
        device: &CudaDevice,
    ) -> Result<Option<(&Chosen, Option<&Tensor>)>> {
        if !self.chosen.contains_key(shape) {
            if self.chosen.len() >= SHAPES_MAX {
                self.chosen.clear();
            }
            let chosen = Chosen::of(self.handle, shape, scales).map_err(|error| failed(shape, error))?;
            self.grow(chosen.as_ref().map_or(0, |chosen| chosen.workspace_bytes), device)?;
            self.chosen.insert(*shape, chosen);
        }
        let chosen = self.chosen.get(shape).and_then(Option::as_ref);
        Ok(chosen.map(|chosen| (chosen, self.workspace.as_ref())))
    }

    fn grow(&mut self, bytes: usize, device: &CudaDevice) -> Result<()> {
        if bytes > self.workspace.as_ref().map_or(0, Tensor::elem_count) {
            if super::graph::is_capturing() {
                bail!("memory that outlives a graph cannot be taken while it is recorded");
            }
            self.workspace = None;
            self.workspace = Some(crate::ops::unwritten(bytes, DType::U8, &Device::Cuda(device.clone()))?);
        }
        Ok(())
    }
}

impl Chosen {
    /// Returns the library's first choice.
    fn of(
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        scales: Option<[u64; 2]>,
    ) -> std::result::Result<Option<Chosen>, CublasError> {
        let ([m, n, k], [a_turned, b_turned]) = (shape.mnk, shape.transposed);
        let ([a_stride, b_stride, c_stride, d_stride], [input, output]) =
            (shape.strides, shape.types.map(data_type));
        let layout = |data, turned: bool, rows: usize, columns: usize, stride: usize| {
            let (rows, columns) = if turned { (columns, rows) } else { (rows, columns) };
            result::create_matrix_layout(data, rows as u64, columns as u64, stride as i64)
        };
        let mut chosen = Chosen {
            description: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            )?,
            layouts: [
                layout(input, b_turned, n, k, b_stride)?,
                layout(input, a_turned, k, m, a_stride)?,
                layout(output, false, n, m, c_stride)?,
                layout(output, false, n, m, d_stride)?,
            ],
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace_bytes: 0,
        };
        chosen.turn(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, b_turned)?;
        chosen.turn(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, a_turned)?;
        if let Some(eight_bits) = shape.eight_bits {
            chosen.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &i8::from(eight_bits.fast))?;
        }
        if scales.is_some() {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            chosen.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            chosen.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
            chosen.scale(scales)?;
        }
        match chosen.ask(handle, shape) {
            Ok(found) => {
                (chosen.algorithm, chosen.workspace_bytes) = (found.algo, found.workspaceSize);
                Ok(Some(chosen))
            }
            Err(error) if is_refusal(error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn turn(&self, side: Attribute, turned: bool) -> std::result::Result<(), CublasError> {
        let operation = match turned {
            false => cublasOperation_t::CUBLAS_OP_N,
            true => cublasOperation_t::CUBLAS_OP_T,
        };
        self.set(side, &operation)
    }

    /// Sets the addresses of the scales of a's rows and of b's columns for the next product.
    fn scale(&self, scales: Option<[u64; 2]>) -> std::result::Result<(), CublasError> {
        let Some([of_a, of_b]) = scales else { return Ok(()) };
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &of_b)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &of_a)
    }

    /// Sets an attribute whose value has the type that the library's documentation states.
    fn set<T>(&self, attribute: Attribute, value: &T) -> std::result::Result<(), CublasError> {
        let (value, bytes) = ((&raw const *value).cast(), size_of::<T>());
        // SAFETY: the description is alive, and the library copies so many bytes, which it compares with its own.
        unsafe { result::set_matmul_desc_attribute(self.description, attribute, value, bytes) }
    }

    fn ask(
        &self,
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
    ) -> std::result::Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
        let (preference, limit) = (result::create_matmul_pref()?, WORKSPACE_BYTES_MAX);
        let [a, b, c, d] = shape.alignments;
        let sides = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d),
        ];
        let [left, right, from, to] = self.layouts;
        // SAFETY: all descriptions are alive; a limit of bytes has eight bytes, and an alignment four.
        unsafe {
            let bytes = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let limit = (&raw const limit).cast();
            let mut done = result::set_matmul_pref_attribute(preference, bytes, limit, 8);
            for (side, alignment) in &sides {
                let alignment = (&raw const *alignment).cast();
                done = done.and(result::set_matmul_pref_attribute(preference, *side, alignment, 4));
            }
            let found = done.and_then(|()| {
                let description = self.description;
                result::get_matmul_algo_heuristic(handle, description, left, right, from, to, preference)
            });
            result::destroy_matmul_pref(preference)?;
            found
        }
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        // SAFETY: the descriptions were made with this value, and nothing else refers to them. The library has copied
        // what a queued product needs.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            self.layouts.into_iter().for_each(|layout| {
                let _ = result::destroy_matrix_layout(layout);
            });
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::F8E4M3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

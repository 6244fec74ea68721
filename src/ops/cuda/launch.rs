//! One kernel launch: finds the function by its name, checks the parameters against its signature, and starts the
//! grid.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, result, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// A kernel and the parameters given so far. The first fault is kept and returned by `launch`.
pub struct Launch<'a> {
    device: &'a CudaDevice,
    name: String,
    function: Result<Arc<Function>>,
    dtype: DType,
    parameters: Vec<Parameter>,
    fault: Option<candle_core::Error>,
}

/// The bits of a parameter, low bytes first, and the number of bytes that count.
struct Parameter {
    bits: u64,
    bytes: usize,
}

/// A loaded kernel and the sizes of its parameters, if the driver reports them (12.4 and later).
struct Function {
    function: CudaFunction,
    sizes: Option<Vec<usize>>,
    /// Bytes of shared memory that a block may take.
    shared_bytes: AtomicUsize,
}

/// The shared memory that a kernel may use without asking.
const SHARED_BYTES: usize = 48 << 10;

impl<'a> Launch<'a> {
    /// The kernel `{stem}_{name}_{f32|bf16}` of `kernels/{stem}.cu`, on the device and in the storage type of
    /// `tensor`.
    pub fn new(tensor: &'a Tensor, stem: &str, name: &str) -> Result<Launch<'a>> {
        let suffix = super::suffix(tensor.dtype())?;
        Ok(Launch::named(super::device(tensor)?, stem, format!("{stem}_{name}_{suffix}"), tensor.dtype()))
    }

    /// The kernel `{stem}_{name}`, which has one version for all activation types.
    pub fn untyped(device: &'a CudaDevice, stem: &str, name: &str) -> Launch<'a> {
        Launch::named(device, stem, format!("{stem}_{name}"), DType::F32)
    }

    fn named(device: &'a CudaDevice, stem: &str, name: String, dtype: DType) -> Launch<'a> {
        let function = load(device, stem, &name);
        Launch { device, name, function, dtype, parameters: Vec::new(), fault: None }
    }

    /// Adds a pointer to a tensor in the activations' type.
    pub fn tensor(self, tensor: &Tensor) -> Launch<'a> {
        self.tensor_at(tensor, 0)
    }

    /// Adds a pointer to its element `at`.
    pub fn tensor_at(self, tensor: &Tensor, at: usize) -> Launch<'a> {
        let dtype = self.dtype;
        self.pointer(tensor, at, dtype)
    }

    /// Adds a pointer to a tensor whose type does not follow the activations'.
    pub fn of(self, dtype: DType, tensor: &Tensor) -> Launch<'a> {
        self.pointer(tensor, 0, dtype)
    }

    /// Adds a pointer to its element `at`.
    pub fn of_at(self, dtype: DType, tensor: &Tensor, at: usize) -> Launch<'a> {
        self.pointer(tensor, at, dtype)
    }

    /// Adds a pointer to a tensor that may begin at any element; the kernel must not count on more.
    pub fn anywhere(mut self, dtype: DType, tensor: &Tensor) -> Launch<'a> {
        let found = match tensor.dtype() == dtype {
            true => super::address(tensor, 0),
            false => Err(candle_core::Error::Msg(format!(
                "{}: expected {dtype:?}, found {:?}",
                self.name,
                tensor.dtype()
            ))),
        };
        let address = found.unwrap_or_else(|fault| {
            self.fault.get_or_insert(fault);
            0
        });
        self.push(address, 8)
    }

    /// `of`, or a null pointer for `None`.
    pub fn optional(self, dtype: DType, tensor: Option<&Tensor>) -> Launch<'a> {
        match tensor {
            Some(tensor) => self.pointer(tensor, 0, dtype),
            None => self.push(0, 8),
        }
    }

    /// Adds an `int`. A value beyond 32 bits is an error.
    pub fn int(mut self, value: usize) -> Launch<'a> {
        if value > i32::MAX as usize {
            let fault = candle_core::Error::Msg(format!("{}: {value} is beyond 32 bits", self.name));
            self.fault.get_or_insert(fault);
        }
        self.push(value as u64, 4)
    }

    /// Adds an `unsigned long long`.
    pub fn long(self, value: u64) -> Launch<'a> {
        self.push(value, 8)
    }

    /// Adds a `float`.
    pub fn float(self, value: f64) -> Launch<'a> {
        self.push((value as f32).to_bits() as u64, 4)
    }

    fn pointer(mut self, tensor: &Tensor, at: usize, dtype: DType) -> Launch<'a> {
        /// Kernels read and write 16 bytes at a time. A tensor that may begin elsewhere passes its offset by
        /// `tensor_at`.
        const ALIGNMENT: u64 = 16;
        let found = match tensor.dtype() == dtype {
            true => super::address(tensor, at).and_then(|address| match at > 0 || address % ALIGNMENT == 0 {
                true => Ok(address),
                false => bail!("{}: a tensor that begins between two multiples of 16 bytes", self.name),
            }),
            false => {
                let message = format!("{}: expected {dtype:?}, found {:?}", self.name, tensor.dtype());
                Err(candle_core::Error::Msg(message))
            }
        };
        let address = found.unwrap_or_else(|fault| {
            self.fault.get_or_insert(fault);
            0
        });
        self.push(address, 8)
    }

    fn push(mut self, bits: u64, bytes: usize) -> Launch<'a> {
        self.parameters.push(Parameter { bits, bytes });
        self
    }

    /// Queues the launch; `grid` is (x, y, z) blocks. An empty grid launches nothing. Wrong parameters are an
    /// error.
    pub fn launch(mut self, grid: (usize, usize, usize), threads: usize, shared_bytes: usize) -> Result<()> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let function = self.function?;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        if let Some(sizes) = &function.sizes {
            let found: Vec<usize> = self.parameters.iter().map(|parameter| parameter.bytes).collect();
            if *sizes != found {
                bail!("{}: its parameters have {sizes:?} bytes, found {found:?}", self.name);
            }
        }
        if grid.0 > i32::MAX as usize || grid.1 > 65_535 || grid.2 > 65_535 {
            bail!("{}: a grid of {grid:?}", self.name);
        }
        self.device.cuda_stream().context().bind_to_thread().w()?;
        if shared_bytes > function.shared_bytes.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.function.set_attribute(attribute, shared_bytes as i32).w()?;
            function.shared_bytes.store(shared_bytes, Ordering::Relaxed);
        }
        super::count_launch();
        let mut pointers: Vec<*mut c_void> =
            self.parameters.iter_mut().map(|parameter| (&raw mut parameter.bits).cast()).collect();
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        // SAFETY: the number and the sizes of the parameters were compared with the kernel's own. The tensors
        // behind the addresses were alive when these were taken and are freed in stream order. The tests of every
        // operation show, on the emulator with address checks, that each kernel stays inside its tensors.
        unsafe {
            result::launch_kernel(
                function.function.cu_function(),
                grid,
                (threads as u32, 1, 1),
                shared_bytes as u32,
                self.device.cuda_stream().cu_stream(),
                &mut pointers,
            )
        }
        .map_err(|error| candle_core::Error::Msg(format!("{}: {error}", self.name)))
    }
}

/// Returns a kernel. Modules are loaded once per device; functions are looked up once.
fn load(device: &CudaDevice, stem: &str, name: &str) -> Result<Arc<Function>> {
    type Functions = HashMap<usize, HashMap<String, Arc<Function>>>;
    static FUNCTIONS: OnceLock<Mutex<Functions>> = OnceLock::new();
    let context = device.cuda_stream().context().clone();
    let mut functions =
        FUNCTIONS.get_or_init(Default::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // The key is the context and not the device's number, because a second context on the same GPU has its own
    // modules.
    let functions = functions.entry(context.cu_ctx() as usize).or_default();
    if let Some(function) = functions.get(name) {
        return Ok(function.clone());
    }
    let Some((_, image)) = FATBINS.iter().find(|(file, _)| *file == stem) else {
        bail!("kernels/{stem}.cu is not part of this binary");
    };
    let module = context.load_module(Ptx::from_binary(image.to_vec())).w()?;
    let function = module
        .load_function(name)
        .map_err(|error| candle_core::Error::Msg(format!("kernels/{stem}.cu: {name}: {error}")))?;
    let shared_bytes = AtomicUsize::new(SHARED_BYTES);
    let function = Arc::new(Function { sizes: parameter_sizes(&function), function, shared_bytes });
    functions.insert(name.to_owned(), function.clone());
    Ok(function)
}

fn parameter_sizes(function: &CudaFunction) -> Option<Vec<usize>> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut bytes) = (0usize, 0usize);
        // SAFETY: the function is loaded and both numbers may be written; an index beyond the last parameter gives
        // an error code.
        let found =
            unsafe { sys::cuFuncGetParamInfo(function.cu_function(), sizes.len(), &mut offset, &mut bytes) };
        match found {
            sys::CUresult::CUDA_SUCCESS => sizes.push(bytes),
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Some(sizes),
            _ => return None,
        }
    }
}

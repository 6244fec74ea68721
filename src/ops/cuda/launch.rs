//! One kernel launch: finds the function by its name, checks the parameters against its signature, and starts the
//! grid.
//!
//! # Kernels that begin early
//! On cards of compute capability 9.0 and later a kernel is launched with programmatic stream serialization: its blocks
//! may be placed while the kernel before it ends, so that most of the time between two kernels is gone. Every kernel
//! begins with `wait_for_earlier_kernels` (kernels/common.cuh), before it uses any global memory. Its results have the
//! same bits, because the order of all accesses is that without the attribute:
//!
//! - Between kernels of this crate: the wait ends when the kernel before has ended and its writes are visible (PTX ISA,
//!   `griddepcontrol.wait`). That one had waited for the one before it with all of its threads, so the order holds for
//!   all earlier kernels too. A buffer that is freed and taken again in between is used in this order as well. An empty
//!   grid is no launch.
//! - A kernel behind one of a library: it may begin when the blocks of that one have ended or allow it, and waits for
//!   its end in the same way. If a library kernel itself begins before its predecessor ends, it has to wait for that to
//!   read its operands, which are results of this stream, so its end still comes after all earlier ones.
//! - A library's kernel, a copy, a fill, a free or an event behind a kernel: the attribute is one of the launch that
//!   may begin early. All other work of a stream begins after the end of what was queued before, as ever. So do other
//!   streams that wait for an event, and the host.
//! - A kernel behind a copy, a fill or the wait for an event of another stream (side copies, sums of ranks): only the
//!   order behind a kernel may be relaxed ("overlap with the previous kernel in the stream", CUDA Driver API,
//!   `CUlaunchAttributeID`), so it begins after these.
//! - In a graph, the attribute makes the edge between two kernels programmatic (CUDA 12.3). Other edges stay as they
//!   are, also those to and from memory that the graph takes or frees. The graph as a whole begins and ends in the
//!   order of the stream.
//!
//! No kernel here reads what another block of its own grid writes, is launched as a cluster, or needs all of its blocks
//! at once, so blocks that wait hold up nobody: the next kernel is let in when all blocks of this one are running.
//!
//! The wait orders the accesses that the memory model of PTX orders. Loads by the read-only cache (`__ldg`,
//! `__restrict__`) are not among that, so kernels have none; tests/structure.rs reads them for that, and for the call
//! at their beginning.
//!
//! A kernel may ask the L2 cache for memory before it waits, if no kernel writes that memory (`Launch::ahead`). That is
//! no read of the program's: all accesses of the device go through this cache, so a load behind the wait finds what was
//! written before, by copies too.
//!
//! The attribute must never meet code without the wait. So the driver is asked for each function: code is compiled
//! with the wait if its virtual architecture is 9.0 or later, also if the driver has compiled it from PTX for a
//! card that came later.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use crate::ops::change::Change;
use crate::ops::cuda::tensor_map::TensorMap;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// A kernel and the parameters given so far. The first fault is kept and returned by `launch`.
pub struct Launch<'a> {
    device: &'a CudaDevice,
    /// `None`: `fault` says why.
    function: Option<&'static Function>,
    dtype: DType,
    parameters: Vec<Parameter>,
    maps: Vec<TensorMap>,
    fault: Option<candle_core::Error>,
}

/// Returns whether machine code of this file of `kernels` is part of the binary.
pub fn is_built(stem: &str) -> bool {
    FATBINS.iter().any(|(file, image)| *file == stem && !image.is_empty())
}

/// The bits of a parameter, low bytes first, and the number of bytes that count. A tensor map has its number for bits.
struct Parameter {
    bits: u64,
    bytes: usize,
}

/// Parameters of a kernel. None has more.
const PARAMETERS_MAX: usize = 64;
/// Parameters that most kernels stay within.
const PARAMETERS: usize = 24;

/// A loaded kernel and the sizes of its parameters, if the driver reports them (12.4 and later). It stays loaded as
/// long as the process runs.
struct Function {
    /// The parts of its name: of `kernels/{stem}.cu`, the kernel `{stem}_{name}{suffix}`.
    stem: String,
    name: String,
    suffix: &'static str,
    context: usize,
    function: CudaFunction,
    sizes: Option<Vec<usize>>,
    /// Whether the function waits for the kernels before it, so that it may begin before they end.
    waits: bool,
    /// Bytes of shared memory that a block may take.
    shared_bytes: AtomicUsize,
}

impl std::fmt::Display for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}_{}{}", self.stem, self.name, self.suffix)
    }
}

/// The shared memory that a kernel may use without asking.
const SHARED_BYTES: usize = 48 << 10;

impl<'a> Launch<'a> {
    /// Returns the kernel `{stem}_{name}_{f32|bf16}` of `kernels/{stem}.cu`, on the device and in the storage type of
    /// `tensor`.
    pub fn new(tensor: &'a Tensor, stem: &str, name: &str) -> Result<Launch<'a>> {
        let suffix = match tensor.dtype() {
            DType::F32 => "_f32",
            DType::BF16 => "_bf16",
            other => bail!("no {other:?} arithmetic on a GPU: expected f32 or bf16"),
        };
        Ok(Launch::named(super::device(tensor)?, stem, name, suffix, tensor.dtype()))
    }

    /// Returns the kernel `{stem}_{name}`, which has one version for all activation types.
    pub fn untyped(device: &'a CudaDevice, stem: &str, name: &str) -> Launch<'a> {
        Launch::named(device, stem, name, "", DType::F32)
    }

    fn named(
        device: &'a CudaDevice,
        stem: &str,
        name: &str,
        suffix: &'static str,
        dtype: DType,
    ) -> Launch<'a> {
        let (function, fault) = match find(device, stem, name, suffix) {
            Ok(function) => (Some(function), None),
            Err(fault) => (None, Some(fault)),
        };
        let room = if Change::Functions.is_on() { PARAMETERS } else { 0 };
        Launch { device, function, dtype, parameters: Vec::with_capacity(room), maps: Vec::new(), fault }
    }

    fn name(&self) -> String {
        self.function.map_or_else(|| "a kernel".into(), Function::to_string)
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
                self.name(),
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
            let fault = candle_core::Error::Msg(format!("{}: {value} is beyond 32 bits", self.name()));
            self.fault.get_or_insert(fault);
        }
        self.push(value as u64, 4)
    }

    /// Adds the bytes of memory that no kernel writes for which each block asks before it waits for the kernels before
    /// (`read_ahead_and_wait`): an `int`, which is 0 if the kernel does not begin early.
    pub fn ahead(self, bytes: usize) -> Launch<'a> {
        let is_early =
            self.function.is_some_and(|function| function.waits) && super::graph::may_begin_early();
        self.int(if is_early && Change::Ahead.is_on() { bytes } else { 0 })
    }

    /// Adds an `unsigned long long`.
    pub fn long(self, value: u64) -> Launch<'a> {
        self.push(value, 8)
    }

    /// Adds a `float`.
    pub fn float(self, value: f64) -> Launch<'a> {
        self.push((value as f32).to_bits() as u64, 4)
    }

    /// Adds a tensor map (`const __grid_constant__ TensorMap`).
    pub fn map(mut self, map: TensorMap) -> Launch<'a> {
        self.maps.push(map);
        let number = self.maps.len() as u64 - 1;
        self.push(number, TensorMap::BYTES)
    }

    fn pointer(mut self, tensor: &Tensor, at: usize, dtype: DType) -> Launch<'a> {
        /// Kernels read and write 16 bytes at a time. A tensor that may begin elsewhere passes its offset by
        /// `tensor_at`.
        const ALIGNMENT: u64 = 16;
        let found = match tensor.dtype() == dtype {
            true => super::address(tensor, at).and_then(|address| match at > 0 || address % ALIGNMENT == 0 {
                true => Ok(address),
                false => bail!("{}: a tensor that begins between two multiples of 16 bytes", self.name()),
            }),
            false => {
                let message = format!("{}: expected {dtype:?}, found {:?}", self.name(), tensor.dtype());
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
        let function = self.function.expect("it is there, or a fault is");
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        function.check(&self.parameters, grid)?;
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        if shared_bytes > function.shared_bytes.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.function.set_attribute(attribute, shared_bytes as i32).w()?;
            function.shared_bytes.store(shared_bytes, Ordering::Relaxed);
        }
        super::count_launch();
        let mut pointers = [std::ptr::null_mut::<c_void>(); PARAMETERS_MAX];
        for (pointer, parameter) in pointers.iter_mut().zip(&mut self.parameters) {
            *pointer = match parameter.bytes {
                TensorMap::BYTES => (&raw mut self.maps[parameter.bits as usize]).cast(),
                _ => (&raw mut parameter.bits).cast(),
            };
        }
        let mut attributes = [begin_early()];
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(function.waits && super::graph::may_begin_early()),
        };
        let pointers = pointers.as_mut_ptr();
        // SAFETY: the number and the sizes of the parameters were compared with the kernel's own. The tensors
        // behind the addresses were alive when these were taken and are freed in stream order. The tests of every
        // operation show, on the emulator with address checks, that each kernel stays inside its tensors.
        // A kernel that may begin early waits before it uses memory (above).
        unsafe {
            sys::cuLaunchKernelEx(&config, function.function.cu_function(), pointers, std::ptr::null_mut())
        }
        .result()
        .map_err(|error| candle_core::Error::Msg(format!("{function}: {error}")))
    }
}

impl Function {
    /// Refuses parameters that are not the kernel's, and grids that no GPU takes.
    fn check(&self, parameters: &[Parameter], grid: (usize, usize, usize)) -> Result<()> {
        let found = || parameters.iter().map(|parameter| parameter.bytes);
        if self.sizes.as_ref().is_some_and(|sizes| !sizes.iter().copied().eq(found())) {
            let (sizes, found) = (self.sizes.as_ref(), found().collect::<Vec<_>>());
            bail!("{self}: its parameters have {sizes:?} bytes, found {found:?}");
        }
        if parameters.len() > PARAMETERS_MAX {
            bail!("{self}: {} parameters", parameters.len());
        }
        if grid.0 > i32::MAX as usize || grid.1 > 65_535 || grid.2 > 65_535 {
            bail!("{self}: a grid of {grid:?}");
        }
        Ok(())
    }

    fn is(&self, context: usize, stem: &str, name: &str, suffix: &str) -> bool {
        (self.context, self.stem.as_str(), self.name.as_str(), self.suffix) == (context, stem, name, suffix)
    }
}

/// A hasher for keys that are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| hash.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

thread_local! {
    /// The kernels that this thread has launched, by a hash of their names.
    static KNOWN: RefCell<HashMap<u64, &'static Function, BuildHasherDefault<AsItIs>>> = RefCell::default();
}

/// Returns a kernel: one that this thread has launched before without a lock, others by `load`.
fn find(device: &CudaDevice, stem: &str, name: &str, suffix: &'static str) -> Result<&'static Function> {
    if !Change::Functions.is_on() {
        return load(device, stem, name, suffix);
    }
    let context = device.cuda_stream().context().cu_ctx() as usize;
    // FNV-1a over the name's parts and the context.
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let bytes = stem.bytes().chain([b'_']).chain(name.bytes()).chain(suffix.bytes());
    let key = bytes.fold(0xcbf2_9ce4_8422_2325 ^ context as u64, step);
    KNOWN.with_borrow_mut(|known| {
        if let Some(function) = known.get(&key).filter(|function| function.is(context, stem, name, suffix)) {
            return Ok(*function);
        }
        let function = load(device, stem, name, suffix)?;
        known.insert(key, function);
        Ok(function)
    })
}

/// Returns a kernel. Its module is loaded at its first use on a device.
fn load(device: &CudaDevice, stem: &str, name: &str, suffix: &'static str) -> Result<&'static Function> {
    type Functions = HashMap<usize, HashMap<String, &'static Function>>;
    static FUNCTIONS: OnceLock<Mutex<Functions>> = OnceLock::new();
    let context = device.cuda_stream().context().clone();
    let whole = format!("{stem}_{name}{suffix}");
    let mut functions =
        FUNCTIONS.get_or_init(Default::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // The key is the context and not the device's number, because a second context on the same GPU has its own
    // modules.
    let functions = functions.entry(context.cu_ctx() as usize).or_default();
    if let Some(function) = functions.get(&whole) {
        return Ok(function);
    }
    let Some((_, image)) = FATBINS.iter().find(|(file, _)| *file == stem) else {
        bail!("kernels/{stem}.cu is not part of this binary");
    };
    let module = context.load_module(Ptx::from_binary(image.to_vec())).w()?;
    let function = module
        .load_function(&whole)
        .map_err(|error| candle_core::Error::Msg(format!("kernels/{stem}.cu: {whole}: {error}")))?;
    let function = Function {
        stem: stem.to_owned(),
        name: name.to_owned(),
        suffix,
        context: context.cu_ctx() as usize,
        sizes: parameter_sizes(&function),
        waits: waits(&function, context.compute_capability().w()?)?,
        function,
        shared_bytes: AtomicUsize::new(SHARED_BYTES),
    };
    // There are as many as kernels, and they are used until the process ends.
    let function: &'static Function = Box::leak(Box::new(function));
    functions.insert(whole, function);
    Ok(function)
}

/// Returns the attribute of a launch that may begin while the kernel before it ends.
fn begin_early() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// Returns whether the card can let the kernel begin early, and its code was compiled with the wait
/// (`__CUDA_ARCH__ >= 900`). The driver of CUDA 13 that `device::open` asks for knows the attribute, in graphs too.
fn waits(function: &CudaFunction, capability: (i32, i32)) -> Result<bool> {
    /// Version 9.0 of the virtual architecture, as the driver writes it.
    const WAITS_FROM: i32 = 90;
    let ptx = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
    Ok(capability >= (9, 0) && function.get_attribute(ptx).w()? >= WAITS_FROM)
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

//! GPUs of several ranks -> sums and gatherings by NCCL. Bytes of the host go through another `Collective`.
//!
//! libnccl.so.2 is opened when it is needed, so that a program without it trains on one GPU. Calls are queued on a
//! second stream, so that a sum runs while the device computes, and the host waits for none. A thread watches the
//! communicator: if another rank is lost, it aborts the call that the device waits for, and every later call is a
//! fault. It also reports the device's progress to the other ranks, because a device may hang while its host goes on.

use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::{DType, Device, Tensor};

use crate::fault::{Fault, Kind, Result};
use crate::ops::cuda;
use crate::ops::cuda::side::Side;

use super::{Collective, Place, check_gather, check_sum};

const FILE: &str = "libnccl.so.2";
/// 2.18, whose configuration of a communicator is the one used here; later versions read it too.
const VERSION_MIN: c_int = 21_800;
/// LIMIT: time that the ranks have to connect.
const CONNECT_PATIENCE: Duration = Duration::from_secs(600);
/// Time between two looks at the communicator.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Time between two looks while a call is being queued.
const QUEUE_INTERVAL: Duration = Duration::from_micros(200);
/// Time that the hosts have to find out which rank was lost and why, after NCCL said only that one was.
const REASON_MAX: Duration = Duration::from_secs(5);
/// The buffer numbers of `Side`.
const GATHERED: usize = 0;
const SUMMED: usize = 1;

// Values of nccl.h.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const UINT8: c_int = 1;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const UNSET: c_int = c_int::MIN;
const MAGIC: c_uint = 0xcafe_beef;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([u8; 128]);

/// `ncclConfig_t` as of 2.18.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cluster_size: c_int,
    blocks_min: c_int,
    blocks_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

type Communicator = *mut c_void;
type Stream = *mut c_void;

macro_rules! library {
    ($($(#[$doc:meta])* $field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of NCCL that are called, as nccl.h declares them.
        struct Library {
            $($(#[$doc])* $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            /// Finds the functions in an opened library; the name of one that is missing is the error.
            fn of(library: *mut c_void) -> std::result::Result<Library, &'static CStr> {
                let find = |name: &'static CStr| {
                    // SAFETY: the library is open and never closed.
                    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
                    if symbol.is_null() { Err(name) } else { Ok(symbol) }
                };
                Ok(Library {
                    // SAFETY: nccl.h gives the function of this name this type, which is part of its ABI.
                    $($field: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(find($name)?)
                    },)*
                })
            }
        }
    };
}

library! {
    version = c"ncclGetVersion": fn(*mut c_int) -> c_int;
    unique_id = c"ncclGetUniqueId": fn(*mut Id) -> c_int;
    init = c"ncclCommInitRankConfig": fn(*mut Communicator, c_int, Id, c_int, *mut Config) -> c_int;
    state = c"ncclCommGetAsyncError": fn(Communicator, *mut c_int) -> c_int;
    abort = c"ncclCommAbort": fn(Communicator) -> c_int;
    destroy = c"ncclCommDestroy": fn(Communicator) -> c_int;
    all_reduce = c"ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int;
    all_gather = c"ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Communicator, Stream) -> c_int;
    error_text = c"ncclGetErrorString": fn(c_int) -> *const c_char;
    last_error = c"ncclGetLastError": fn(Communicator) -> *const c_char;
}

impl Library {
    /// Returns the library of this process, opened at the first call.
    fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<std::result::Result<Library, Fault>> = OnceLock::new();
        LIBRARY.get_or_init(Library::open).as_ref().map_err(Fault::clone)
    }

    fn open() -> Result<Library> {
        let open = |file: &PathBuf| {
            let path = CString::new(file.as_os_str().as_encoded_bytes()).ok()?;
            // SAFETY: opening the library runs its constructors. It is never closed, so that its functions stay valid.
            let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            (!library.is_null()).then_some(library)
        };
        let Some(library) = places().iter().find_map(open) else {
            return Err(missing(&format!("{FILE} is not there")));
        };
        let library = Library::of(library)
            .map_err(|name| missing(&format!("{FILE} has no {}", name.to_string_lossy())))?;
        let mut version = 0;
        // SAFETY: the pointer is to one number that may be written.
        unsafe { (library.version)(&mut version) };
        match version >= VERSION_MIN {
            true => Ok(library),
            false => {
                Err(missing(&format!("{FILE} is of version {version}, expected {VERSION_MIN} or later")))
            }
        }
    }

    /// Returns the meaning of a code, with NCCL's text of its last error.
    fn text(&self, code: c_int, communicator: Communicator) -> String {
        // SAFETY: both functions return a text that stays as it is, or null.
        let texts = unsafe { [(self.error_text)(code), (self.last_error)(communicator)] };
        let read = |text: *const c_char| {
            // SAFETY: a text of NCCL ends with a zero.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
        };
        let texts: Vec<String> = texts.into_iter().filter_map(read).filter(|text| !text.is_empty()).collect();
        texts.join(": ")
    }
}

/// Returns the places where the library is looked for, in this order: the folders of HONE_CUDA_LIBS, those of the
/// system, the package that pip installs in a virtual environment, and CUDA's own folder.
fn places() -> Vec<PathBuf> {
    let named = std::env::var_os("HONE_CUDA_LIBS").unwrap_or_default();
    let named = std::env::split_paths(&named).map(|folder| folder.join(FILE)).collect::<Vec<_>>();
    let packages = std::env::var_os("VIRTUAL_ENV").map(|folder| Path::new(&folder).join("lib"));
    let packages = packages.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let packages = packages.map(|entry| entry.path().join("site-packages/nvidia/nccl/lib").join(FILE));
    let packages = packages.filter(|file| file.exists());
    let system = [PathBuf::from(FILE)];
    let cuda = [Path::new("/usr/local/cuda/lib64").join(FILE)];
    named.into_iter().filter(|file| file.is_absolute()).chain(system).chain(packages).chain(cuda).collect()
}

fn missing(what: &str) -> Fault {
    Fault::config(format!("several GPUs need NCCL for CUDA 13: {what}")).help(
        "install NCCL (pip install nvidia-nccl-cu13, or Debian's libnccl2), or name its folder in HONE_CUDA_LIBS; \
         one GPU needs no NCCL",
    )
}

/// This rank's part of a communicator over the GPUs of all ranks.
pub struct Nccl {
    host: Arc<dyn Collective>,
    device: Device,
    /// The stream of all calls.
    side: Side,
    shared: Arc<Shared>,
}

struct Shared {
    library: &'static Library,
    state: Mutex<State>,
}

struct State {
    /// `None` after it was aborted or destroyed.
    communicator: Option<Handle>,
    /// The reason why it was aborted, and when.
    fault: Option<(Fault, Instant)>,
    /// Sums that were queued and have not ended, as far as the watching thread has seen.
    queued: VecDeque<Queued>,
    /// Sums and gatherings that have ended.
    ended: u64,
}

/// A sum or a gathering that was queued.
struct Queued {
    /// The device has come to it.
    begins: CudaEvent,
    /// It is complete.
    ends: CudaEvent,
}

struct Handle(Communicator);

// SAFETY: NCCL's functions may be called from any thread, one at a time; the lock of `State` sees to that.
unsafe impl Send for Handle {}

impl Nccl {
    /// Connects the GPUs of all ranks. Afterwards the device has the memory that NCCL takes for its buffers. `host` is
    /// the connections of their hosts, over which rank 0 sends the data to connect with.
    ///
    /// # Errors
    /// Config: there is no NCCL, or a version that is too old. Device: the ranks cannot connect.
    pub fn over(host: Arc<dyn Collective>, device: &Device) -> Result<Nccl> {
        let place = host.place();
        let library = Library::get();
        let mut id = Id([0; 128]);
        if let (Ok(library), true) = (&library, place.leads()) {
            // SAFETY: the pointer is to one id that may be written.
            let code = unsafe { (library.unique_id)(&mut id) };
            if code != SUCCESS {
                return Err(failed(&library.text(code, std::ptr::null_mut())));
            }
        }
        // A rank without the library says so in the place of an id.
        let own = if library.is_ok() { id.0.to_vec() } else { Vec::new() };
        let all = host.exchange(&own)?;
        let library = library?;
        if let Some(rank) = all.iter().position(Vec::is_empty) {
            return Err(missing(&format!("rank {rank} has no {FILE}, or one that is too old")));
        }
        let id =
            Id(all[0].as_slice().try_into().map_err(|_| Fault::internal("rank 0 sent no id of NCCL"))?);
        bind(device)?;
        let communicator = connect(library, place, id, &*host)?;
        let state =
            State { communicator: Some(communicator), fault: None, queued: VecDeque::new(), ended: 0 };
        let shared = Arc::new(Shared { library, state: Mutex::new(state) });
        let (watched, ranks, stream) = (shared.clone(), host.clone(), device.as_cuda_device()?.cuda_stream());
        std::thread::Builder::new()
            .name("nccl".into())
            .spawn(move || {
                // Events are asked in the device's context. If that fails, no event is ever complete.
                let _ = stream.context().bind_to_thread();
                while watched.look(&*ranks).is_none() {
                    std::thread::sleep(LOOK_INTERVAL)
                }
            })
            .map_err(|error| Fault::machine("start a thread", &error))?;
        let side = Side::new(device.as_cuda_device()?, 2)?;
        let ranks = Nccl { host, device: device.clone(), side, shared };
        // NCCL takes the device's memory for its buffers in the first calls, and the memory plan must see the rest.
        for values in [1, 1 << 20] {
            ranks.sum(&Tensor::zeros(values, DType::F32, device)?)?;
        }
        Ok(ranks)
    }

    /// Queues a call on the second stream, behind all work that the device's stream has queued so far. `number` is that
    /// of the buffer. It is queued when NCCL says so, which in the first call takes until all ranks have made it.
    fn queue(&self, number: usize, call: impl FnOnce(&Library, Communicator, Stream) -> c_int) -> Result<()> {
        let stream = self.side.begin()?.cast();
        let begins = self.side.mark()?;
        let mut code = {
            let state = self.shared.lock();
            let communicator = state.communicator.as_ref().map(|handle| handle.0);
            let Some(communicator) = communicator else { return Err(self.why_aborted(state)) };
            call(self.shared.library, communicator, stream)
        };
        while code == IN_PROGRESS {
            std::thread::sleep(QUEUE_INTERVAL);
            let state = self.shared.lock();
            let communicator = state.communicator.as_ref().map(|handle| handle.0);
            let Some(communicator) = communicator else { return Err(self.why_aborted(state)) };
            code = self.shared.library.state_of(communicator);
        }
        if code != SUCCESS {
            self.shared.fail(code);
            return Err(self.why_aborted(self.shared.lock()));
        }
        self.side.end(number)?;
        let ends = self.side.mark()?;
        self.shared.lock().queued.push_back(Queued { begins, ends });
        Ok(())
    }

    /// Returns the reason why the communicator is gone. The hosts know which rank was lost and why, if it was one; NCCL
    /// does not.
    fn why_aborted(&self, state: MutexGuard<State>) -> Fault {
        let Some((fault, at)) = state.fault.clone() else {
            return Fault::internal("NCCL was left before the last call");
        };
        drop(state);
        loop {
            if let Some(known) = self.host.ended() {
                return known;
            }
            if at.elapsed() >= REASON_MAX {
                return fault;
            }
            std::thread::sleep(LOOK_INTERVAL / 10);
        }
    }
}

impl Library {
    /// Returns the state of a communicator: success, in progress, or an error.
    fn state_of(&self, communicator: Communicator) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator is neither aborted nor destroyed, and the pointer is to one number.
        let code = unsafe { (self.state)(communicator, &mut state) };
        if code == SUCCESS { state } else { code }
    }
}

impl State {
    /// Returns the tick of the device (`Collective::device_is_at`).
    fn tick(&mut self) -> u64 {
        while self.queued.front().is_some_and(|first| first.ends.is_complete()) {
            self.queued.pop_front();
            self.ended += 1;
        }
        2 * self.ended + u64::from(self.queued.front().is_some_and(|first| first.begins.is_complete()))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Looks after the communicator once. Returns something if there is nothing left to watch.
    fn look(&self, ranks: &dyn Collective) -> Option<()> {
        if let Some(fault) = ranks.ended() {
            self.abort(&mut self.lock(), fault);
        }
        let mut state = self.lock();
        let Some(communicator) = state.communicator.as_ref().map(|handle| handle.0) else {
            // An even number: the device waits for no other.
            ranks.device_is_at(2 * state.ended);
            return Some(());
        };
        ranks.device_is_at(state.tick());
        let code = self.library.state_of(communicator);
        if !matches!(code, SUCCESS | IN_PROGRESS) {
            let fault = failed(&self.library.text(code, communicator));
            self.abort(&mut state, fault);
        }
        None
    }

    /// Aborts after a call failed with a code.
    fn fail(&self, code: c_int) {
        let mut state = self.lock();
        let communicator = state.communicator.as_ref().map_or(std::ptr::null_mut(), |handle| handle.0);
        let fault = failed(&self.library.text(code, communicator));
        self.abort(&mut state, fault);
    }

    /// Aborts the calls that the device waits for. The first reason counts, and is known before the device goes on.
    fn abort(&self, state: &mut State, fault: Fault) {
        state.fault.get_or_insert_with(|| (fault, Instant::now()));
        if let Some(handle) = state.communicator.take() {
            // SAFETY: the handle was just taken, so nobody uses it from here on.
            unsafe { (self.library.abort)(handle.0) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if let Some(handle) = self.shared.lock().communicator.take() {
            // SAFETY: the handle was just taken, so nobody uses it from here on.
            unsafe { (self.shared.library.destroy)(handle.0) };
        }
    }
}

/// Connects to the other ranks, and waits until that is done.
fn connect(library: &Library, place: Place, id: Id, ranks: &dyn Collective) -> Result<Handle> {
    let mut config = Config {
        size: size_of::<Config>(),
        magic: MAGIC,
        version: VERSION_MIN as c_uint,
        blocking: 0,
        cluster_size: UNSET,
        blocks_min: UNSET,
        blocks_max: UNSET,
        net_name: std::ptr::null(),
        split_share: UNSET,
    };
    let (mut communicator, until) = (std::ptr::null_mut(), Instant::now() + CONNECT_PATIENCE);
    let (world, rank) = (place.world as c_int, place.rank as c_int);
    // SAFETY: the pointers are to one handle and one configuration, and live beyond the call.
    let mut code = unsafe { (library.init)(&mut communicator, world, id, rank, &mut config) };
    while code == IN_PROGRESS && !communicator.is_null() {
        if let Some(fault) = ranks.ended() {
            // SAFETY: the handle is used no more.
            unsafe { (library.abort)(communicator) };
            return Err(fault);
        }
        if Instant::now() > until {
            let seconds = CONNECT_PATIENCE.as_secs();
            return Err(failed(&format!("the ranks did not connect within {seconds} s")));
        }
        std::thread::sleep(LOOK_INTERVAL / 10);
        code = library.state_of(communicator);
    }
    match code {
        SUCCESS => Ok(Handle(communicator)),
        code => Err(failed(&library.text(code, communicator))),
    }
}

/// Makes the device's context this thread's.
fn bind(device: &Device) -> Result<()> {
    Ok(device.as_cuda_device()?.cuda_stream().context().bind_to_thread().w()?)
}

fn failed(what: &str) -> Fault {
    Fault::new(Kind::Device, format!("the ranks' GPUs cannot work together: NCCL: {what}"))
        .help("NCCL_DEBUG=INFO shows what NCCL does; NCCL_SOCKET_IFNAME chooses the network between machines")
}

impl Collective for Nccl {
    fn place(&self) -> Place {
        self.host.place()
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        self.begin_sum(flat)?;
        self.summed()
    }

    fn begin_sum(&self, flat: &Tensor) -> Result<()> {
        check_sum(flat)?;
        let at = cuda::address(flat, 0)? as *mut c_void;
        bind(&self.device)?;
        self.queue(SUMMED, |library, communicator, stream| {
            // SAFETY: the tensor holds this many f32 values from its address on. It lives until `summed`, behind which
            // the device's own stream frees it.
            unsafe { (library.all_reduce)(at, at, flat.elem_count(), FLOAT32, SUM, communicator, stream) }
        })
    }

    fn summed(&self) -> Result<()> {
        Ok(self.side.wait(SUMMED)?)
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        check_gather(whole, piece, self.place().world)?;
        let (to, from) = (cuda::address(whole, 0)? as *mut c_void, cuda::address(piece, 0)? as *const c_void);
        bind(&self.device)?;
        self.queue(GATHERED, |library, communicator, stream| {
            // SAFETY: `piece` holds this many bytes, and `whole` as many for each rank. Both live until `arrived`,
            // behind which the device's own stream frees them.
            unsafe { (library.all_gather)(from, to, piece.elem_count(), UINT8, communicator, stream) }
        })
    }

    fn arrived(&self) -> Result<()> {
        Ok(self.side.wait(GATHERED)?)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.exchange(bytes)
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.host.broadcast(bytes)
    }

    fn ended(&self) -> Option<Fault> {
        self.host.ended().or_else(|| {
            let state = self.shared.lock();
            state.fault.is_some().then(|| self.why_aborted(state))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::side;
    use crate::ops::{self, judge};
    use crate::ranks::threads::{self, Threads};

    #[test]
    fn sums_and_gatherings_reach_every_rank() {
        // Two ranks cannot share a real GPU.
        let fake = std::env::var_os("HONE_FAKE_GPU_ORDER").is_some();
        let world: usize = if fake { 3 } else { 1 };
        judge::on_gpu(|gpu| {
            let found = threads::all(Threads::of(world), |ranks| {
                let rank = ranks.place().rank;
                let ranks = Nccl::over(Arc::new(ranks), &gpu.device).unwrap();
                let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu).unwrap();
                // A part of a tensor, so that the address counts.
                let flat = Tensor::new(&[0.1f32; 9], &gpu.device).unwrap();
                ranks.sum(&flat.narrow(0, 2, 5).unwrap()).unwrap();
                let piece = Tensor::new(&[rank as u8, 9], &gpu.device).unwrap();
                let whole = Tensor::zeros(2 * world, DType::U8, &gpu.device).unwrap();
                ranks.gather_into(&whole, &piece).unwrap();
                ranks.arrived().unwrap();
                assert!(ranks.ended().is_none());
                assert_eq!(ranks.exchange(&[rank as u8]).unwrap().concat().len(), world);
                assert_eq!(ranks.broadcast(&[rank as u8]).unwrap(), [0]);
                let sums = cpu(&flat).to_vec1::<f32>().unwrap();
                // Every rank is done before one of them leaves.
                (sums, cpu(&whole).to_vec1::<u8>().unwrap(), ranks)
            });
            let sum = (world as f64 * f64::from(0.1f32)) as f32;
            for (sums, whole, _) in &found {
                assert_eq!(*sums, [0.1, 0.1, sum, sum, sum, sum, sum, 0.1, 0.1]);
                assert_eq!(*whole, [0, 9, 1, 9, 2, 9][..2 * world]);
            }
            Ok(())
        })
        .unwrap();
    }

    /// Returns the content of a tensor of eight ones after the ranks added up its second half beside other work on the
    /// first.
    fn summed_in_part(ranks: Threads, device: &Device, omitted: Option<side::Omitted>) -> Vec<f32> {
        let ranks = Nccl::over(Arc::new(ranks), device).unwrap();
        let put = |values: [f32; 4]| Tensor::new(&values, device).unwrap();
        let flat = Tensor::zeros(8, DType::F32, device).unwrap();
        let half = |number: usize| flat.narrow(0, 4 * number, 4).unwrap();
        let (ones, twos) = (put([1.0; 4]), put([2.0; 4]));
        ops::flat::write(&half(1), &ones).unwrap();
        side::OMITTED.set(omitted);
        ranks.begin_sum(&half(1)).unwrap();
        ops::flat::write(&half(0), &twos).unwrap();
        ranks.summed().unwrap();
        let found = flat.to_device(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
        side::OMITTED.set(None);
        // The sum may still be on its way.
        drop(ranks);
        found
    }

    #[test]
    fn a_sum_runs_beside_other_work_and_each_event_is_needed() {
        // The fake driver delivers sums late, and spoils those that nothing orders.
        if std::env::var_os("HONE_FAKE_GPU_ORDER").is_none() {
            return;
        }
        judge::on_gpu(|gpu| {
            let found =
                |omitted| threads::all(Threads::of(2), |ranks| summed_in_part(ranks, &gpu.device, omitted));
            let expected = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0];
            assert!(found(None).iter().all(|values| *values == expected), "{:?}", found(None));
            for event in [side::Omitted::Free, side::Omitted::Filled] {
                let spoilt = found(Some(event));
                assert!(
                    spoilt.iter().all(|values| values[4..].iter().all(|value| value.is_nan())),
                    "{event:?}: {spoilt:?}"
                );
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_library_that_is_missing_says_what_to_install() {
        let fault = missing("libnccl.so.2 is not there");
        assert_eq!(fault.kind, Kind::Config);
        assert!(fault.help.unwrap().contains("pip install nvidia-nccl-cu13"));
    }
}

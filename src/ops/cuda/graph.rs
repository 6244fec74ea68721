//! Work of a stream, recorded once -> one call that repeats it: CUDA graphs, one for each shape of a step.
//!
//! While a stream is captured nothing runs. Launches are recorded with their arguments, so everything that differs from
//! step to step lies in memory at a fixed address (`inputs`). Tensors that are made and dropped within the capture are
//! memory of the graph. The rest must exist before and outlive the graph.
//!
//! Memory that a graph takes and frees stands between its kernels, and only kernels that follow each other directly may
//! begin early (`launch`). So a short step leaves the tensors that it made to its recording: they belong to the graph's
//! owner, each has its own place, and the graph is kernels alone.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};
use candle_core::{CudaDevice, DType, Result, Shape, Tensor, bail};

use crate::ops::change::Change;

/// Recorded work.
pub struct Graph {
    graph: CudaGraph,
    /// Device memory that it took.
    bytes: u64,
    /// The workspace of the graph's products by cublasLt.
    workspace: u64,
    /// The switches at the time of the recording that decide how kernels begin.
    beginnings: [bool; 2],
    /// The tensors that it uses beside its own.
    #[cfg_attr(not(test), expect(dead_code, reason = "held, so that their memory stays"))]
    kept: Vec<Tensor>,
}

// SAFETY: the driver takes a graph's handles from any thread. They are used through exclusive owners only, one thread
// at a time.
unsafe impl Send for Graph {}

thread_local! {
    /// Whether this thread captures its stream.
    static CAPTURING: Cell<bool> = const { Cell::new(false) };
    /// Whether kernels that it records may begin early.
    static EARLY: Cell<bool> = const { Cell::new(true) };
}

/// The source of the tensors that this thread makes and writes.
enum Memory {
    /// Each is new.
    Own,
    /// Each is new. All of them stay for the recording that follows, if they have at most `bytes_max` bytes together.
    Stays { tensors: Vec<Tensor>, bytes: u64, bytes_max: u64 },
    /// Each is the next one of those that stayed, in the same order.
    Stayed(std::vec::IntoIter<Tensor>),
}

thread_local! {
    static MEMORY: RefCell<Memory> = const { RefCell::new(Memory::Own) };
}

/// Returns a tensor whose elements are written before they are read: one that `make` makes, or in a recording the one
/// of the step before it.
pub fn tensor(shape: &Shape, dtype: DType, make: impl FnOnce(&Shape) -> Result<Tensor>) -> Result<Tensor> {
    MEMORY.with_borrow_mut(|memory| match memory {
        Memory::Own => make(shape),
        Memory::Stays { tensors, bytes, bytes_max } => {
            let tensor = make(shape)?;
            *bytes += (shape.elem_count() * dtype.size_in_bytes()) as u64;
            match bytes <= bytes_max {
                true => tensors.push(tensor.clone()),
                false => *memory = Memory::Own,
            }
            Ok(tensor)
        }
        Memory::Stayed(tensors) => match tensors.next() {
            Some(tensor) if tensor.shape() == shape && tensor.dtype() == dtype => Ok(tensor),
            found => {
                let found = found.map(|tensor| (tensor.shape().clone(), tensor.dtype()));
                bail!("a recorded step makes {shape:?} in {dtype:?}, the step before it made {found:?}")
            }
        },
    })
}

/// Does `work`, and returns the tensors that it made if they have at most so many bytes.
fn done_with(bytes_max: u64, work: impl Fn() -> Result<()>) -> Result<Option<Vec<Tensor>>> {
    MEMORY.set(Memory::Stays { tensors: Vec::new(), bytes: 0, bytes_max });
    let done = work();
    let memory = MEMORY.replace(Memory::Own);
    done?;
    Ok(match memory {
        Memory::Stays { tensors, .. } => Some(tensors),
        _ => None,
    })
}

/// Held while a stream is captured, and by other threads that use it.
static STREAM: Mutex<()> = Mutex::new(());

/// Keeps other threads from capturing the stream. A thread that uses the stream of a capturing thread holds this
/// meanwhile, since its calls would become part of the graph.
pub fn apart() -> MutexGuard<'static, ()> {
    STREAM.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns whether this thread's calls to the device are recorded instead of executed.
pub fn is_capturing() -> bool {
    CAPTURING.get()
}

/// Returns whether a kernel that this thread launches may begin while the one before it ends, if the card can do that.
pub(super) fn may_begin_early() -> bool {
    Change::Early.is_on() && (EARLY.get() || !is_capturing())
}

/// Returns the switches that decide how kernels begin: early or not, and whether they ask for memory ahead.
fn beginnings() -> [bool; 2] {
    [Change::Early, Change::Ahead].map(Change::is_on)
}

/// Records the calls of `work` to the device. Every tensor that it makes is dropped when it returns.
///
/// # Errors
/// The errors of `work`, and calls that the driver does not allow in a graph. Then nothing was done, and the device is
/// as before.
pub fn capture(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
    let _apart = apart();
    let stream = device.cuda_stream();
    let free = super::device::memory(device)?.0;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    CAPTURING.set(true);
    let done = work();
    CAPTURING.set(false);
    // Failures to free a tensor are kept until the next call, which must not be the one that ends the capture.
    let of_tensors = stream.context().check_err();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    done?;
    let Some(graph) = graph.w()? else { bail!("the driver recorded nothing") };
    of_tensors.w()?;
    // The graph takes its memory now, since a lack of memory here does not fail a step.
    graph.upload().w()?;
    let bytes = free.saturating_sub(super::device::memory(device)?.0) as u64;
    let (workspace, beginnings) = (super::lt::workspace(), beginnings());
    Ok(Graph { graph, bytes, workspace, beginnings, kept: Vec::new() })
}

/// Does `capture` with the tensors of the step before it, if that step left them. A driver that refuses kernels that
/// begin early is asked for a graph of plain ones, which costs only the time between them; `early` is false then.
fn captured(
    early: &mut bool,
    device: &CudaDevice,
    kept: &[Tensor],
    work: impl Fn() -> Result<()>,
) -> Result<Graph> {
    let with = |early: bool| {
        let before = EARLY.replace(early);
        if !kept.is_empty() {
            MEMORY.set(Memory::Stayed(Vec::from(kept).into_iter()));
        }
        let captured = capture(device, &work);
        MEMORY.set(Memory::Own);
        EARLY.set(before);
        captured.map(|graph| graph.keeping(kept))
    };
    let first = with(*early);
    let may_help = |error: &candle_core::Error| !crate::ops::out_of_memory(error);
    if !*early || !Change::Early.is_on() || !first.as_ref().is_err_and(may_help) {
        return first;
    }
    let plain = with(false)?;
    *early = false;
    Ok(plain)
}

impl Graph {
    /// Queues the recorded work.
    pub fn launch(&self) -> Result<()> {
        super::count_launch();
        self.graph.launch().w()
    }

    fn keeping(self, kept: &[Tensor]) -> Graph {
        let bytes = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        Graph { bytes: self.bytes + kept.iter().map(bytes).sum::<u64>(), kept: kept.to_vec(), ..self }
    }

    /// Returns whether the memory that its products work in is still there, and its kernels begin as they would now.
    fn is_whole(&self) -> bool {
        self.workspace == super::lt::workspace() && self.beginnings == beginnings()
    }
}

/// Graphs by the shape for which they were recorded. A shape gets one at its second use; the least recently used are
/// dropped.
pub struct Graphs<K> {
    known: HashMap<K, Known>,
    clock: u64,
    bytes_max: u64,
    /// Most bytes of tensors that a step leaves to its recording; 0: none.
    kept_max: u64,
    /// Kernels begin early in graphs: the driver has not refused that.
    early: bool,
    refusal: Option<String>,
}

struct Known {
    /// `None`: it was used once.
    graph: Option<Graph>,
    last: u64,
}

/// Graphs that are kept at most.
const GRAPHS_MAX: usize = 64;
/// Shapes that are remembered at most.
const SHAPES_MAX: usize = 1024;

impl<K: Clone + Eq + Hash> Graphs<K> {
    /// Returns an empty set of graphs, which will take at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Graphs<K> {
        Graphs { known: HashMap::new(), clock: 0, bytes_max, kept_max: 0, early: true, refusal: None }
    }

    /// Returns the same, for steps that leave their tensors to the recording if these have at most so many bytes. Such
    /// a step is done launch by launch twice: the second time makes the tensors.
    pub fn of_kernels(self, kept_max: u64) -> Graphs<K> {
        Graphs { kept_max, ..self }
    }

    /// Does `work`, whose launches depend on `key` alone: directly the first time, by its graph later. If the driver
    /// refuses the graph, no further one is tried.
    pub fn run(&mut self, key: &K, device: &CudaDevice, work: impl Fn() -> Result<()>) -> Result<()> {
        self.clock += 1;
        let clock = self.clock;
        if self.refusal.is_some() {
            return work();
        }
        let Some(known) = self.known.get_mut(key) else {
            work()?;
            self.forget(SHAPES_MAX, |_| true);
            self.known.insert(key.clone(), Known { graph: None, last: clock });
            return Ok(());
        };
        known.last = clock;
        if let Some(graph) = known.graph.as_ref().filter(|graph| graph.is_whole()) {
            return graph.launch();
        }
        known.graph = None;
        let is_done = self.kept_max > 0;
        let kept = if is_done { done_with(self.kept_max, &work)?.unwrap_or_default() } else { Vec::new() };
        match captured(&mut self.early, device, &kept, &work) {
            Ok(graph) => {
                if !is_done {
                    graph.launch()?;
                }
                known.graph = Some(graph);
                self.make_room(device)
            }
            Err(error) => {
                drop(kept);
                self.clear(device)?;
                self.refusal = Some(error.to_string());
                if is_done { Ok(()) } else { work() }
            }
        }
    }

    /// Returns the reason why there is no graph, once.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Returns the number of graphs, and bytes of device memory that they took.
    pub fn size(&self) -> (usize, u64) {
        let graphs = self.known.values().filter_map(|known| known.graph.as_ref());
        graphs.fold((0, 0), |(count, bytes), graph| (count + 1, bytes + graph.bytes))
    }

    /// Forgets all shapes, and gives their graphs' memory back. Waits for the device if there is a graph.
    pub fn clear(&mut self, device: &CudaDevice) -> Result<()> {
        if self.size().0 > 0 {
            super::synchronize(device)?;
        }
        self.known.clear();
        super::device::trim_graphs(device)
    }

    /// Returns whether there is a graph.
    pub fn is_empty(&self) -> bool {
        self.size().0 == 0
    }

    fn make_room(&mut self, device: &CudaDevice) -> Result<()> {
        while {
            let (count, bytes) = self.size();
            count > GRAPHS_MAX || (count > 1 && bytes > self.bytes_max)
        } {
            // A graph may not go while the device works on it.
            super::synchronize(device)?;
            self.forget(0, |known| known.graph.is_some());
        }
        Ok(())
    }

    /// Forgets the shape that was used longest ago, if there are at least so many.
    fn forget(&mut self, at_least: usize, which: impl Fn(&Known) -> bool) {
        if self.known.len() < at_least {
            return;
        }
        let those = self.known.iter().filter(|(_, known)| which(known));
        if let Some(key) = those.min_by_key(|(_, known)| known.last).map(|(key, _)| key.clone()) {
            self.known.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{judge, rows, unwritten};
    use candle_core::{DType, Device, Tensor};

    /// Opens a GPU with a stream that no other test uses, because calls of other tests would be recorded too.
    fn own_gpu() -> Option<Device> {
        judge::gpu().map(|_| super::super::device::open(0).expect("it opened before"))
    }

    fn values(tensor: &Tensor) -> Result<Vec<f32>> {
        tensor.to_vec1::<f32>()
    }

    /// Each launch adds the sum again, from the memory's content at that time.
    #[test]
    fn a_graph_does_again_what_was_recorded_and_the_capture_did_nothing() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let (x, y) = (Tensor::new(&[1f32, 2., 3., 4.], &device)?, Tensor::zeros(4, DType::F32, &device)?);
        let work = || {
            let copy = unwritten(4, DType::F32, &device)?;
            super::super::copy(&x, &copy)?;
            rows::add(&y, &copy)
        };
        work()?; // It loads the kernel.
        let graph = capture(cuda, work)?;
        assert_eq!(values(&y)?, [1., 2., 3., 4.]);
        graph.launch()?;
        super::super::copy(&Tensor::new(&[10f32; 4], &device)?, &x)?;
        graph.launch()?;
        assert_eq!(values(&y)?, [12., 14., 16., 18.]);
        Ok(())
    }

    /// Work that waits or copies to the host cannot be recorded. It is done all the same, and nothing is tried again.
    #[test]
    fn what_cannot_be_recorded_is_done_without_a_graph() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let y = Tensor::zeros(2, DType::F32, &device)?;
        let one = Tensor::new(&[1f32; 2], &device)?;
        let mut graphs = Graphs::new(u64::MAX);
        for round in 1..=4 {
            graphs.run(&0, cuda, || {
                let sum = rows::convert(&y, DType::F32)?;
                rows::add(&y, &one)?;
                sum.to_vec1::<f32>().map(|_| ())
            })?;
            assert_eq!(values(&y)?, [round as f32; 2]);
            assert_eq!(graphs.refusal().is_some(), round > 1);
        }
        assert_eq!(graphs.size().0, 0);
        Ok(())
    }

    /// The second use makes the tensors, the third one launches. Tensors with too many bytes stay in the graph's own
    /// memory.
    #[test]
    fn a_recording_uses_the_tensors_of_the_step_before_it() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let (x, y) = (Tensor::new(&[1f32, 2., 3., 4.], &device)?, Tensor::zeros(4, DType::F32, &device)?);
        for (bytes_max, kept) in [(1 << 10, 2), (31, 0)] {
            super::super::copy(&Tensor::zeros(4, DType::F32, &device)?, &y)?;
            let mut graphs = Graphs::new(u64::MAX).of_kernels(bytes_max);
            for round in 1..=4 {
                graphs.run(&0, cuda, || {
                    let (copy, again) =
                        (unwritten(4, DType::F32, &device)?, unwritten((2, 2), DType::F32, &device)?);
                    super::super::copy(&x, &copy)?;
                    super::super::copy(&copy, &again)?;
                    rows::add(&y, &again.flatten_all()?)
                })?;
                let sum = [1f32, 2., 3., 4.].map(|value| value * round as f32);
                assert_eq!(values(&y)?, sum, "{kept} kept, round {round}");
                let graph = graphs.known[&0].graph.as_ref();
                assert_eq!(graph.map(|graph| graph.kept.len()), (round > 1).then_some(kept));
            }
        }
        Ok(())
    }

    /// A recording that makes other tensors than the step before it is none, and the step is done all the same.
    #[test]
    fn a_recording_makes_the_tensors_of_the_step_before_it() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let (y, one) = (Tensor::zeros(1, DType::F32, &device)?, Tensor::new(&[1f32], &device)?);
        let mut graphs = Graphs::new(u64::MAX).of_kernels(1 << 10);
        for round in 1..=3 {
            graphs.run(&0, cuda, || {
                drop(unwritten(if is_capturing() { 2 } else { 1 }, DType::F32, &device)?);
                rows::add(&y, &one)
            })?;
            assert_eq!(values(&y)?, [round as f32]);
        }
        assert!(graphs.refusal().is_some_and(|why| why.contains("the step before it made")));
        Ok(())
    }

    #[test]
    fn a_driver_that_refuses_kernels_that_begin_early_gets_plain_ones() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let (y, one) = (Tensor::zeros(1, DType::F32, &device)?, Tensor::new(&[1f32], &device)?);
        let mut graphs = Graphs::new(u64::MAX);
        for round in 1..=3 {
            graphs.run(&0, cuda, || match is_capturing() && may_begin_early() {
                true => bail!("no such edge"),
                false => rows::add(&y, &one),
            })?;
            assert_eq!(values(&y)?, [round as f32]);
        }
        assert!(graphs.refusal().is_none() && !graphs.early && may_begin_early());
        assert_eq!(graphs.size().0, 1);
        Ok(())
    }

    #[test]
    fn a_shape_gets_its_graph_at_its_second_use_and_old_graphs_give_way() -> Result<()> {
        let Some(device) = own_gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let y = Tensor::zeros(1, DType::F32, &device)?;
        let one = Tensor::new(&[1f32], &device)?;
        let mut graphs = Graphs::new(u64::MAX);
        let mut sum = 0.0;
        let mut run = |graphs: &mut Graphs<usize>, key| {
            sum += 1.0;
            graphs.run(&key, cuda, || rows::add(&y, &one))?;
            assert_eq!(y.to_device(&Device::Cpu)?.to_vec1::<f32>()?, [sum]);
            Ok::<_, candle_core::Error>(graphs.size().0)
        };
        assert_eq!([run(&mut graphs, 0)?, run(&mut graphs, 0)?, run(&mut graphs, 0)?], [0, 1, 1]);
        for key in 1..=GRAPHS_MAX {
            run(&mut graphs, key)?;
            run(&mut graphs, key)?;
        }
        assert_eq!(graphs.size().0, GRAPHS_MAX);
        assert!(!graphs.known.contains_key(&0));
        // Without memory, the newest stays.
        graphs.known.values_mut().filter_map(|known| known.graph.as_mut()).for_each(|graph| graph.bytes = 1);
        graphs.bytes_max = 0;
        assert_eq!(run(&mut graphs, 0)?, GRAPHS_MAX);
        assert_eq!(run(&mut graphs, 0)?, 1);
        assert!(graphs.known[&0].graph.is_some());
        Ok(())
    }
}

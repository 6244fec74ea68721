//! Operands and a kernel -> blocks of `c`: which panels are packed when, by whom, and which stay in which cache.
//!
//! The smaller operand is packed whole, once, by all threads together. The larger one is cut into runs of panels that
//! fit L2: a task packs one run for itself and multiplies it with every panel of the smaller one, which streams by.
//! So each operand is packed once, and a panel block of the streaming operand stays in L1 for a whole run.

use super::source::{Side, Source};
use super::{Matrix, Precision};
use rayon::prelude::*;
use std::cell::RefCell;

/// Lanes of a panel: rows of `a` or columns of `b` that one call of a kernel multiplies.
pub const LANES: usize = 32;
/// A tile is 16 lanes by 64 bytes of depth; one step of a panel is two tiles for each plane.
pub const TILE_BYTES: usize = 1024;
/// Sums of 32x32 elements of `c`: four tiles of 16x16, row by row.
pub const BLOCK: usize = LANES * LANES;

/// The functions of one instruction set. Every `unsafe fn` here demands that the kernel's instruction set exists.
pub struct Kernel {
    pub name: &'static str,
    /// Elements of depth in one step: 16 of f32, 32 of bf16.
    pub step: usize,
    /// Splits f32 into bf16 planes: `Source::planes`. Otherwise one plane.
    pub split: bool,
    /// Packs one panel: `lanes` from `lane`, `depth` from `start`; zeros fill lanes and the last step.
    pub pack: unsafe fn(&Source, Side, Precision, Span, &mut [u8]),
    /// Called by a thread before and after a series of `multiply`.
    pub begin: unsafe fn(),
    pub end: unsafe fn(),
    pub multiply: unsafe fn(Multiply),
    /// Puts sums into `c`.
    pub store: unsafe fn(&[f32; BLOCK], rows: usize, cols: usize, c: Target),
}

/// The part of an operand that becomes one panel.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub lane: usize,
    pub lanes: usize,
    pub start: usize,
    pub depth: usize,
}

/// One panel block of `a` times one of `b`, added to `sums` or replacing them.
#[derive(Clone, Copy)]
pub struct Multiply {
    pub steps: usize,
    pub a: *const u8,
    pub b: *const u8,
    pub a_planes: usize,
    pub b_planes: usize,
    pub sums: *mut f32,
    pub add: bool,
    pub rows: usize,
    pub cols: usize,
}

/// Where sums go: `c = alpha * sum + beta * c`.
#[derive(Clone, Copy)]
pub struct Target {
    pub data: *mut f32,
    pub row_stride: usize,
    pub alpha: f32,
    pub beta: f32,
}

// SAFETY: tasks get disjoint blocks of `c`, whose borrow outlives them.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Depth packed at a time; longer products are added up in `c`. Bounds the panels of a run to L2.
const DEPTH_MAX: usize = 2048;
/// A run of panels, with its share of L2 (2 MiB on server cores, 1 MiB on older ones).
const RUN_BYTES_MAX: usize = 1 << 20;
/// Panel block of the streaming operand that stays in L1 (32 or 48 KiB) beside tiles of the other.
const L1_BYTES: usize = 32 << 10;
/// The operand that is packed whole; larger ones are taken in pieces.
const WHOLE_BYTES_MAX: usize = 64 << 20;

struct Operand<'a> {
    source: Source<'a>,
    side: Side,
    planes: usize,
    lanes: usize,
}

pub fn run(
    kernel: &Kernel,
    threads: usize,
    [m, n, k]: [usize; 3],
    a: &Matrix,
    b: &Matrix,
    c: Target,
    precision: Precision,
) {
    let operand = |matrix, side, lanes| {
        let source = Source::new(matrix, side);
        let planes = if kernel.split { source.planes(precision) } else { 1 };
        Operand { source, side, planes, lanes }
    };
    let (a, b) = (operand(a, Side::A, m), operand(b, Side::B, n));
    let (whole, runs) = if m * a.planes <= n * b.planes { (a, b) } else { (b, a) };
    let job = Job { kernel, threads, whole, runs, precision };
    // k = 0 still scales c.
    let mut start = 0;
    loop {
        let depth = DEPTH_MAX.min(k - start);
        let beta = if start == 0 { c.beta } else { 1.0 };
        job.slice(start, depth, Target { beta, ..c });
        start += depth;
        if start >= k {
            break;
        }
    }
}

struct Job<'a> {
    kernel: &'a Kernel,
    threads: usize,
    whole: Operand<'a>,
    runs: Operand<'a>,
    precision: Precision,
}

impl Job<'_> {
    /// Adds the products of one range of depth to `c`.
    fn slice(&self, start: usize, depth: usize, c: Target) {
        let panel_bytes = self.panel_bytes(&self.whole, depth).max(1);
        let piece = (WHOLE_BYTES_MAX / panel_bytes).max(1) * LANES;
        for lane in (0..self.whole.lanes).step_by(piece) {
            let lanes = piece.min(self.whole.lanes - lane);
            self.piece(Span { lane, lanes, start, depth }, c);
        }
    }

    fn piece(&self, span: Span, c: Target) {
        let bytes = self.panel_bytes(&self.whole, span.depth);
        let run_bytes = self.panel_bytes(&self.runs, span.depth).max(1);
        let panels = self.runs.lanes.div_ceil(LANES);
        let run_max = (RUN_BYTES_MAX / run_bytes).clamp(1, RUN_PANELS_MAX);
        let tasks = panels.div_ceil(run_max).next_multiple_of(self.threads).min(panels);
        let first_panel = |task: usize| task * panels / tasks;
        with_buffer(bytes * span.lanes.div_ceil(LANES), |whole| {
            self.pack(&self.whole, span, whole, self.threads);
            let whole = &*whole;
            for_each(self.threads, tasks, |task| {
                let lane = first_panel(task) * LANES;
                let lanes = (first_panel(task + 1) * LANES).min(self.runs.lanes) - lane;
                self.run(whole, span, Span { lane, lanes, ..span }, c);
            });
        });
    }

    /// One task: packs a run of panels and multiplies it with the whole other operand.
    fn run(&self, whole: &[u8], whole_span: Span, span: Span, c: Target) {
        let (whole_bytes, run_bytes) =
            (self.panel_bytes(&self.whole, span.depth), self.panel_bytes(&self.runs, span.depth));
        let panels = span.lanes.div_ceil(LANES);
        with_buffer(run_bytes * panels, |run| {
            self.pack(&self.runs, span, run, 1);
            let mut sums = [Sums([0.0; BLOCK]); RUN_PANELS_MAX];
            // SAFETY: the kernel was chosen because this machine can run it.
            unsafe { (self.kernel.begin)() };
            for (index, lane) in (0..whole_span.lanes).step_by(LANES).enumerate() {
                let whole = &whole[index * whole_bytes..][..whole_bytes];
                let whole_part = Span {
                    lane: whole_span.lane + lane,
                    lanes: LANES.min(whole_span.lanes - lane),
                    ..whole_span
                };
                self.panel(whole, whole_part, run, span, &mut sums, c);
            }
            // SAFETY: as above.
            unsafe { (self.kernel.end)() };
        });
    }

    /// One panel of the whole operand with every panel of a run.
    fn panel(&self, whole: &[u8], whole_span: Span, run: &[u8], span: Span, sums: &mut [Sums], c: Target) {
        let steps = span.depth.div_ceil(self.kernel.step);
        let (whole_step, run_step) = (self.step_bytes(&self.whole), self.step_bytes(&self.runs));
        let block = (L1_BYTES / whole_step).max(1);
        let mut first = 0;
        loop {
            let count = block.min(steps - first);
            let last = first + count >= steps;
            for (index, sums) in sums.iter_mut().enumerate().take(span.lanes.div_ceil(LANES)) {
                let run = run[(index * steps + first) * run_step..].as_ptr();
                let whole = whole[first * whole_step..].as_ptr();
                let lane = span.lane + index * LANES;
                let lanes = LANES.min(span.lanes - index * LANES);
                let rows_first = self.whole.side == Side::A;
                let (a, b) = if rows_first { (whole, run) } else { (run, whole) };
                let (row, rows, col, cols) = if rows_first {
                    (whole_span.lane, whole_span.lanes, lane, lanes)
                } else {
                    (lane, lanes, whole_span.lane, whole_span.lanes)
                };
                let (a_planes, b_planes) = if rows_first {
                    (self.whole.planes, self.runs.planes)
                } else {
                    (self.runs.planes, self.whole.planes)
                };
                let multiply = Multiply {
                    steps: count,
                    a,
                    b,
                    a_planes,
                    b_planes,
                    sums: sums.0.as_mut_ptr(),
                    add: first > 0,
                    rows,
                    cols,
                };
                // SAFETY: the kernel runs here (`begin` was called); both panels hold `count` steps from these
                // pointers on; the block [rows, cols] at (row, col) lies inside `c` and belongs to this task.
                unsafe {
                    (self.kernel.multiply)(multiply);
                    if last {
                        let data = c.data.add(row * c.row_stride + col);
                        (self.kernel.store)(&sums.0, rows, cols, Target { data, ..c });
                    }
                }
            }
            first += count;
            if last {
                break;
            }
        }
    }

    /// Packs all panels of a span, panel after panel.
    fn pack(&self, operand: &Operand, span: Span, out: &mut [u8], threads: usize) {
        let bytes = self.panel_bytes(operand, span.depth);
        if bytes == 0 {
            return;
        }
        let pack = |(index, out): (usize, &mut [u8])| {
            let lane = index * LANES;
            let part = Span { lane: span.lane + lane, lanes: LANES.min(span.lanes - lane), ..span };
            // SAFETY: the kernel was chosen because this machine can run it; views were checked to cover their
            // shapes, and `part` lies inside.
            unsafe { (self.kernel.pack)(&operand.source, operand.side, self.precision, part, out) }
        };
        if threads > 1 && out.len() > bytes {
            out.par_chunks_mut(bytes).enumerate().for_each(pack);
        } else {
            out.chunks_mut(bytes).enumerate().for_each(pack);
        }
    }

    fn panel_bytes(&self, operand: &Operand, depth: usize) -> usize {
        depth.div_ceil(self.kernel.step) * self.step_bytes(operand)
    }

    fn step_bytes(&self, operand: &Operand) -> usize {
        operand.planes * 2 * TILE_BYTES
    }
}

/// Panels a run has at most: their sums (4 KiB each) stay near while one streaming panel passes.
const RUN_PANELS_MAX: usize = 16;

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums([f32; BLOCK]);

fn for_each(threads: usize, tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if threads > 1 && tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

thread_local! {
    /// Buffers not in use. A list, because a thread that waits in one product may run a task of another.
    static BUFFERS: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `bytes` of memory, aligned to 64 bytes, of arbitrary content.
fn with_buffer<R>(bytes: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    let lines = bytes.div_ceil(64);
    let mut buffer = BUFFERS.with_borrow_mut(|buffers| {
        // The smallest that is large enough, else the largest.
        let fit = |buffer: &Vec<Line>| (buffer.len() < lines, buffer.len().abs_diff(lines));
        let best = (0..buffers.len()).min_by_key(|&index| fit(&buffers[index]));
        best.map(|index| buffers.swap_remove(index)).unwrap_or_default()
    });
    if buffer.len() < lines {
        buffer = vec![Line([0; 64]); lines];
    }
    // SAFETY: `Line` is 64 initialised bytes without padding, and there are `lines` of them.
    let slice = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<u8>(), bytes) };
    let result = work(slice);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

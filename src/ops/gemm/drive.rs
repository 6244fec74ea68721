//! Operands and a kernel -> blocks of `c`: which panels are packed when, by whom, and which stay in which cache.
//!
//! The smaller operand is packed whole, once, by all threads together. The larger one is cut into runs of panels that
//! fit L2: a task packs one run for itself and multiplies it with every panel of the smaller one, which streams by.
//! So each operand is packed once, and a panel block of the streaming operand stays in L1 for a whole run.

use super::Matrix;
use super::buffer::with_buffer;
use super::source::{Side, Source};
use crate::facts::Precision;
use rayon::prelude::*;

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
    /// Packs panel after panel: `lanes` from `lane`, `depth` from `start`; zeros fill the last lanes and step.
    pub pack: unsafe fn(&Source, Side, Precision, Span, &mut [u8]),
    /// Called by a thread before and after a series of `multiply`.
    pub begin: unsafe fn(),
    pub end: unsafe fn(),
    pub multiply: unsafe fn(Multiply),
    /// Puts sums into `c`.
    pub store: unsafe fn(sums: *const f32, rows: usize, cols: usize, c: Target),
}

/// The part of an operand that becomes one panel or several.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub lane: usize,
    pub lanes: usize,
    pub start: usize,
    pub depth: usize,
}

impl Span {
    pub fn panels(self) -> usize {
        self.lanes.div_ceil(LANES)
    }

    /// The part that becomes the panel of this index.
    pub fn panel(self, index: usize) -> Span {
        let lane = index * LANES;
        Span { lane: self.lane + lane, lanes: LANES.min(self.lanes - lane), ..self }
    }
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
    pub soon: Soon,
}

/// Memory to prefetch while multiplying: lines of the next panel for each step, and the block of `c`.
#[derive(Clone, Copy)]
pub struct Soon {
    pub panel: *const u8,
    pub panel_lines: usize,
    pub c: *const f32,
    pub c_rows: usize,
    pub c_row_stride: usize,
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

/// Depth packed at a time when both operands are one plane; longer products are added up in `c`. A long slice reads
/// and writes `c` less often, a short one leaves more lanes in a run and streams the other operand less often; more
/// planes make streaming dearer by the square root of their product.
const DEPTH_MAX: usize = 1536;
/// A run of panels, with its share of L2 (2 MiB on server cores, 1 MiB on older ones).
const RUN_BYTES_MAX: usize = 1 << 20;
/// Panel block of the streaming operand that stays in L1 (32 or 48 KiB) beside the sums of a group.
const L1_BYTES: usize = 16 << 10;
/// The same for three planes by one: two steps in 16 KiB are too short beside loading the sums (+10 %, measured).
const L1_BYTES_THREE_BY_ONE: usize = 24 << 10;
/// Panels of a run that share one pass over a block: 4 KiB of sums each.
const GROUP: usize = 16;
/// The operand that is packed whole; larger ones are taken in pieces.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// Depth below which writing `c` costs more than reading panels.
const SHORT: usize = 128;

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
    let slice = slice_depth(k, a.planes * b.planes, kernel.step);
    // A short product is all about writing `c`, which goes along rows when `b` is the one in runs.
    let (whole, runs) = if k <= SHORT || m * a.planes <= n * b.planes { (a, b) } else { (b, a) };
    let job = Job { kernel, threads, whole, runs, precision };
    // k = 0 still scales c.
    let mut start = 0;
    loop {
        let depth = slice.min(k - start);
        let beta = if start == 0 { c.beta } else { 1.0 };
        job.slice(start, depth, Target { beta, ..c });
        start += depth;
        if start >= k {
            break;
        }
    }
}

/// Cuts `k` into equal slices; depends on nothing that changes from run to run.
fn slice_depth(k: usize, planes: usize, step: usize) -> usize {
    let max = match planes {
        1 => DEPTH_MAX,
        2..=4 => DEPTH_MAX * 5 / 8,
        _ => DEPTH_MAX / 3,
    };
    k.div_ceil(k.div_ceil(max).max(1)).next_multiple_of(step).max(1)
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
        let run_max = (RUN_BYTES_MAX / run_bytes).max(1);
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
        with_buffer(run_bytes * panels + GROUP * BLOCK * size_of::<f32>(), |buffer| {
            let (run, sums) = buffer.split_at_mut(run_bytes * panels);
            self.pack(&self.runs, span, run, 1);
            let (run, sums) = (&*run, sums.as_mut_ptr().cast());
            // SAFETY: the kernel was chosen because this machine can run it.
            unsafe { (self.kernel.begin)() };
            for index in 0..whole_span.lanes.div_ceil(LANES) {
                let whole = &whole[index * whole_bytes..][..whole_bytes];
                self.panel(whole, whole_span.panel(index), run, span, sums, c);
            }
            // SAFETY: as above.
            unsafe { (self.kernel.end)() };
        });
    }

    /// One panel of the whole operand with every panel of a run: a group of panels at a time, block after block of
    /// depth, so that a block of the one panel and the group's sums stay in L1.
    fn panel(&self, whole: &[u8], whole_span: Span, run: &[u8], span: Span, sums: *mut f32, c: Target) {
        let steps = span.depth.div_ceil(self.kernel.step);
        let (whole_step, run_step) = (self.step_bytes(&self.whole), self.step_bytes(&self.runs));
        let three_by_one = self.whole.planes + self.runs.planes == 4;
        let block = (if three_by_one { L1_BYTES_THREE_BY_ONE } else { L1_BYTES } / whole_step).max(1);
        let panels = span.lanes.div_ceil(LANES);
        let panel_lines = (whole_step / 64).div_ceil(panels.min(GROUP));
        let (a_planes, b_planes) = match self.whole.side {
            Side::A => (self.whole.planes, self.runs.planes),
            Side::B => (self.runs.planes, self.whole.planes),
        };
        for group in (0..panels).step_by(GROUP) {
            for first in (0..steps.max(1)).step_by(block) {
                let count = block.min(steps - first);
                let last = first + count == steps;
                let whole = whole[first * whole_step..].as_ptr();
                for index in group..panels.min(group + GROUP) {
                    let sums = sums.wrapping_add((index - group) * BLOCK);
                    let run = run[(index * steps + first) * run_step..].as_ptr();
                    let part = span.panel(index);
                    let (a, b, row, col) = match self.whole.side {
                        Side::A => (whole, run, whole_span, part),
                        Side::B => (run, whole, part, whole_span),
                    };
                    // SAFETY: the kernel runs here (`begin` was called); both panels hold `count` steps from these
                    // pointers on; the block [rows, cols] at (row, col) lies inside `c` and belongs to this task.
                    unsafe {
                        let data = c.data.add(row.lane * c.row_stride + col.lane);
                        (self.kernel.multiply)(Multiply {
                            steps: count,
                            a,
                            b,
                            a_planes,
                            b_planes,
                            sums,
                            add: first > 0,
                            rows: row.lanes,
                            cols: col.lanes,
                            soon: Soon {
                                panel: whole
                                    .wrapping_add(count * (whole_step + (index - group) * panel_lines * 64)),
                                panel_lines,
                                c: data,
                                c_rows: if last { row.lanes } else { 0 },
                                c_row_stride: c.row_stride,
                            },
                        });
                        if last {
                            (self.kernel.store)(sums, row.lanes, col.lanes, Target { data, ..c });
                        }
                    }
                }
            }
        }
    }

    /// Packs all panels of a span, panel after panel.
    fn pack(&self, operand: &Operand, span: Span, out: &mut [u8], threads: usize) {
        let bytes = self.panel_bytes(operand, span.depth);
        if bytes == 0 {
            return;
        }
        // Neighbouring panels together: their elements may be neighbours in memory.
        let panels = span.panels().div_ceil(2 * threads);
        let chunk = panels * bytes;
        let pack = |(index, out): (usize, &mut [u8])| {
            let lane = index * panels * LANES;
            let lanes = (panels * LANES).min(span.lanes - lane);
            let part = Span { lane: span.lane + lane, lanes, ..span };
            // SAFETY: the kernel was chosen because this machine can run it; views were checked to cover their
            // shapes, and `part` lies inside.
            unsafe { (self.kernel.pack)(&operand.source, operand.side, self.precision, part, out) }
        };
        if threads > 1 && out.len() > chunk {
            out.par_chunks_mut(chunk).enumerate().for_each(pack);
        } else {
            out.chunks_mut(chunk).enumerate().for_each(pack);
        }
    }

    fn panel_bytes(&self, operand: &Operand, depth: usize) -> usize {
        depth.div_ceil(self.kernel.step) * self.step_bytes(operand)
    }

    fn step_bytes(&self, operand: &Operand) -> usize {
        operand.planes * 2 * TILE_BYTES
    }
}

fn for_each(threads: usize, tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if threads > 1 && tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

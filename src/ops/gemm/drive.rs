//! Operands and a kernel -> blocks of `c`: when panels are packed, by which thread, and which cache they stay in.
//!
//! All threads together pack the smaller operand as a whole, once. The larger one is divided into runs of panels
//! that fit L2: a task packs one run for itself and multiplies it with every panel of the smaller operand in turn.
//! So each operand is packed once, and a panel block of the streamed operand stays in L1 for a whole run.

use super::Matrix;
use super::buffer::with_buffer;
use super::source::{Side, Source};
use crate::facts::Precision;
use rayon::prelude::*;

/// Lanes of a panel: the rows of `a` or columns of `b` that one call of a kernel multiplies.
pub const LANES: usize = 32;
/// Bytes of a tile, which is 16 lanes by 64 bytes of depth. One step of a panel is two tiles for each plane.
pub const TILE_BYTES: usize = 1024;
/// Elements of a block of sums, 32x32 elements of `c`: four tiles of 16x16, row by row.
pub const BLOCK: usize = LANES * LANES;

/// The functions of one instruction set. Each `unsafe fn` requires that the machine has that instruction set.
pub struct Kernel {
    /// The name in logs.
    pub name: &'static str,
    /// Elements of depth in one step: 16 for f32, 32 for bf16.
    pub step: usize,
    /// Whether f32 is split into bf16 planes (`Source::planes`). If not, there is one plane.
    pub split: bool,
    /// Packs panel after panel: `lanes` from `lane` on, `depth` from `start` on. Zeros fill the last lanes and the
    /// last step.
    pub pack: unsafe fn(&Source, Side, Precision, Span, &mut [u8]),
    /// Called by a thread before a series of `multiply`.
    pub begin: unsafe fn(),
    /// Called by a thread after a series of `multiply`.
    pub end: unsafe fn(),
    /// Multiplies two panel blocks.
    pub multiply: unsafe fn(Multiply),
    /// Writes sums into `c`.
    pub store: unsafe fn(sums: *const f32, rows: usize, cols: usize, c: Target),
}

/// The part of an operand that becomes one or several panels.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// First lane.
    pub lane: usize,
    /// Number of lanes.
    pub lanes: usize,
    /// First depth.
    pub start: usize,
    /// Number of depths.
    pub depth: usize,
}

impl Span {
    /// Returns the number of panels.
    pub fn panels(self) -> usize {
        self.lanes.div_ceil(LANES)
    }

    /// Returns the part that becomes panel `index`.
    pub fn panel(self, index: usize) -> Span {
        let lane = index * LANES;
        Span { lane: self.lane + lane, lanes: LANES.min(self.lanes - lane), ..self }
    }
}

/// Multiplies one panel block of `a` with one of `b`, and adds the product to `sums` or replaces them.
#[derive(Clone, Copy)]
pub struct Multiply {
    /// Steps of depth in both blocks.
    pub steps: usize,
    /// The block of `a`.
    pub a: *const u8,
    /// The block of `b`.
    pub b: *const u8,
    /// Planes of `a`.
    pub a_planes: usize,
    /// Planes of `b`.
    pub b_planes: usize,
    /// The block of sums, `BLOCK` elements.
    pub sums: *mut f32,
    /// Whether the product is added to `sums`.
    pub add: bool,
    /// Rows of the block that are used.
    pub rows: usize,
    /// Columns of the block that are used.
    pub cols: usize,
    /// Memory to prefetch.
    pub soon: Soon,
}

/// Memory to prefetch while multiplying: lines of the next panel in each step, and the block of `c`.
#[derive(Clone, Copy)]
pub struct Soon {
    /// The next panel.
    pub panel: *const u8,
    /// Cache lines of the panel per step.
    pub panel_lines: usize,
    /// The first element of the block of `c`.
    pub c: *const f32,
    /// Rows of the block of `c`; 0 if it is not needed soon.
    pub c_rows: usize,
    /// Distance between rows of `c`, in elements.
    pub c_row_stride: usize,
}

/// The destination of sums: `c = alpha * sum + beta * c`.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first element.
    pub data: *mut f32,
    /// Distance between rows, in elements.
    pub row_stride: usize,
    /// Factor on the sums.
    pub alpha: f32,
    /// Factor on the old values. With 0 they are not read.
    pub beta: f32,
}

// SAFETY: tasks get disjoint blocks of `c`, and the borrow of `c` outlives them.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Depth that is packed at a time if both operands have one plane; longer products are summed up in `c`. A long
/// slice reads and writes `c` less often. A short slice leaves more lanes in a run, so that the other operand is
/// streamed less often. With more planes, streaming costs more by the square root of their product.
const DEPTH_MAX: usize = 1536;
/// Bytes of a run of panels: its share of L2 (2 MiB on server cores, 1 MiB on older ones).
const RUN_BYTES_MAX: usize = 1 << 20;
/// Bytes of a panel block of the streamed operand, which stays in L1 (32 or 48 KiB) beside the sums of a group.
const L1_BYTES: usize = 16 << 10;
/// The same for three planes by one: in 16 KiB, two steps are too short beside the loading of sums (+10 %,
/// measured).
const L1_BYTES_THREE_BY_ONE: usize = 24 << 10;
/// Panels of a run that share one pass over a block; each has 4 KiB of sums.
const GROUP: usize = 16;
/// Largest part of an operand that is packed as a whole; a larger operand is taken in pieces.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// Depth below which writing `c` costs more than reading panels.
const SHORT: usize = 128;

struct Operand<'a> {
    source: Source<'a>,
    side: Side,
    planes: usize,
    lanes: usize,
}

/// Computes the product. The operands' shapes, the extent of `c` and the kernel's instruction set were checked
/// before.
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
    // A short product spends its time writing `c`, which proceeds along rows if `b` is the operand in runs.
    let (whole, runs) = if k <= SHORT || m * a.planes <= n * b.planes { (a, b) } else { (b, a) };
    let job = Job { kernel, threads, whole, runs, precision };
    // With k = 0 the loop still scales c once.
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

/// Cuts `k` into equal slices. The result depends on nothing that changes between runs.
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

    /// Multiplies one panel of the whole operand with every panel of a run, one group of panels at a time and block
    /// after block of depth, so that a block of the one panel and the group's sums stay in L1.
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
        // Neighbouring panels are packed together, because their elements may be neighbours in memory.
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

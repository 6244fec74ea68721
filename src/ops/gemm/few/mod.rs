//! A few rows of activations by weights side by side -> rows of sums. Each weight is read once, as it is stored.
//!
//! A product of one row spends its time reading the weight, so panels would be packed for nothing. Here a register
//! holds neighbouring values of one row of the weight, and a sum is folded at the end. A sum has the same order
//! whatever the number of rows, of weights or of threads is. It is another order than that of `gemm`.

mod weight;
mod tile;
mod portable;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use portable::Portable;
use rayon::prelude::*;
pub use tile::rounded;
use tile::{BLOCK, Columns, Job, Lanes, Prepared, ROWS_MAX, Rows, dots};
use weight::fits;
pub use weight::{Nested, Weight};

use super::drive::Target;
use super::{Matrix, Rounding};
use crate::facts::Precision;

/// Values of a weight that one task reads at least; waking a thread costs as much.
const TASK_VALUES_MIN: usize = 1 << 16;

/// `c[i, j] = alpha * sum + beta * c[i, j]` for each of the weights' rows, one weight after the other.
#[allow(clippy::too_many_arguments)]
pub fn few(
    x: &[f32],
    x_stride: usize,
    rows: usize,
    weights: &[Weight],
    alpha: f32,
    beta: f32,
    c: &mut [f32],
    c_row_stride: usize,
    precision: Precision,
) {
    few_at(level(), x, x_stride, rows, weights, alpha, beta, c, c_row_stride, precision);
}

/// Does `few` by one of the machine's instruction sets.
#[allow(clippy::too_many_arguments)]
pub(super) fn few_at(
    level: Level,
    x: &[f32],
    x_stride: usize,
    rows: usize,
    weights: &[Weight],
    alpha: f32,
    beta: f32,
    c: &mut [f32],
    c_row_stride: usize,
    precision: Precision,
) {
    let depth = weights.first().map_or(0, |weight| weight.matrix.shape().1);
    let columns: usize = weights.iter().map(|weight| weight.matrix.shape().0).sum();
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(depth <= x_stride || rows == 1, "rows of x overlap");
    assert!((rows - 1) * x_stride + depth <= x.len(), "x[{rows}, {depth}] reaches outside its data");
    assert!(columns <= c_row_stride || rows == 1, "rows of c overlap");
    assert!((rows - 1) * c_row_stride + columns <= c.len(), "c[{rows}, {columns}] reaches outside its data");
    weights.iter().for_each(|weight| weight.check(depth, precision));
    let job = Job { x, x_stride, rows, depth, weights, precision };
    let c = Target { data: c.as_mut_ptr(), row_stride: c_row_stride, alpha, beta };
    run_at(level, &job, c);
}

/// Computes the products at a level of instructions. Products of bf16 pairs need weights that are bf16 or become it.
fn run_at(level: Level, job: &Job, c: Target) {
    #[cfg(target_arch = "x86_64")]
    {
        let in_pairs = |weight: &Weight| match &weight.matrix {
            Matrix::Bf16 { .. } => true,
            Matrix::F32 { .. } => false,
            Matrix::FourBit { weight, .. } => {
                weight.rounding == Rounding::Bf16 && fits(weight, avx512::Pairs::WIDTH)
            }
        };
        let pairs = job.precision == Precision::Bf16 && job.weights.iter().all(in_pairs);
        match level {
            Level::Pairs if pairs => return run::<avx512::Pairs>(job, c, avx512::pairs),
            Level::Pairs | Level::Avx512 => return run::<avx512::Floats>(job, c, avx512::floats),
            Level::Avx2 => return run::<avx2::Floats>(job, c, avx2::floats),
            Level::Portable => {}
        }
    }
    let _ = level;
    run::<Portable>(job, c, dots::<Portable>);
}

/// Instruction sets, the slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Portable,
    Avx2,
    Avx512,
    Pairs,
}

/// Returns the machine's instruction set, or the lower one that `HONE_BENCH_GEMM` names. It is chosen once.
pub(super) fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let named = std::env::var(super::KERNEL_VARIABLE).unwrap_or_default();
        let most = match named.as_str() {
            "portable" => Level::Portable,
            "avx2" => Level::Avx2,
            "avx512" => Level::Avx512,
            _ => Level::Pairs,
        };
        of_machine().min(most)
    })
}

fn of_machine() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::ops::gemm::{avx2, avx512};
        match () {
            () if avx512::has_bf16() => return Level::Pairs,
            () if avx512::has_f32() => return Level::Avx512,
            () if avx2::available() => return Level::Avx2,
            () => {}
        }
    }
    Level::Portable
}

/// The sums of a block: some columns of one weight by up to `ROWS_MAX` rows, `[row * BLOCK + column]`.
type Dots<L> = unsafe fn(&Job, &Columns, &Prepared<L>, Range<usize>, &mut [f32]);

fn run<L: Lanes>(job: &Job, c: Target, dots: Dots<L>)
where
    L::Element: Send + Sync,
{
    let prepared: Prepared<L> = Rows::new::<L>(job);
    let blocks = blocks(job);
    let values = job.weights.iter().map(|weight| weight.matrix.shape().0 * job.depth).sum::<usize>();
    let tasks = (values / TASK_VALUES_MIN).clamp(1, 4 * rayon::current_num_threads()).min(blocks.len());
    let task = |task: usize| {
        let mut scales = Vec::new();
        for (weight, first, range) in &blocks[task * blocks.len() / tasks..(task + 1) * blocks.len() / tasks]
        {
            let columns = columns(&job.weights[*weight], range, &mut scales);
            for from in (0..job.rows).step_by(ROWS_MAX) {
                let rows = from..(from + ROWS_MAX).min(job.rows);
                let mut sums = [0f32; BLOCK * ROWS_MAX];
                // SAFETY: the machine has the instruction set; shapes were checked; blocks of `c` are disjoint.
                unsafe {
                    dots(job, &columns, &prepared, rows.clone(), &mut sums);
                    store(&sums, rows, first + range.start, range.len(), c);
                }
            }
        }
    };
    match tasks {
        1 => task(0),
        _ => (0..tasks).into_par_iter().with_max_len(1).for_each(task),
    }
}

/// Returns the rows of a block, with their scales.
fn columns<'a>(weight: &Weight<'a>, range: &Range<usize>, scales: &'a mut Vec<f32>) -> Columns<'a> {
    let (mut matrix, range) = (weight.matrix, range.clone());
    let scales = match (&mut matrix, weight.nested) {
        (Matrix::FourBit { weight, .. }, Some(nested)) => {
            let (from, to) = (range.start * weight.cols / weight.block, range.end * weight.cols);
            nested.read(from..to.div_ceil(weight.block), scales);
            scales.as_ptr().wrapping_sub(from)
        }
        (Matrix::FourBit { weight, .. }, None) => weight.absmax.as_ptr(),
        _ => std::ptr::null(),
    };
    Columns { matrix, range, scales }
}

/// Returns (weight, the first column of `c` of all its rows, its rows) of each block.
fn blocks(job: &Job) -> Vec<(usize, usize, Range<usize>)> {
    let mut first = 0;
    let mut blocks = Vec::new();
    for (number, weight) in job.weights.iter().enumerate() {
        let count = weight.matrix.shape().0;
        let ranges = (0..count).step_by(BLOCK).map(|from| from..(from + BLOCK).min(count));
        blocks.extend(ranges.map(|range| (number, first, range)));
        first += count;
    }
    blocks
}

/// Writes a block of sums.
///
/// # Safety
/// The block lies inside `c`, and no other thread has it.
unsafe fn store(sums: &[f32], rows: Range<usize>, first: usize, columns: usize, c: Target) {
    for (sums, row) in sums.chunks(BLOCK).zip(rows) {
        // SAFETY: guaranteed by the caller.
        let to = unsafe { std::slice::from_raw_parts_mut(c.data.add(row * c.row_stride + first), columns) };
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = if c.beta == 0.0 { c.alpha * sum } else { c.alpha * sum + c.beta * *to };
        }
    }
}

//! A few rows of activations by weights side by side -> rows of sums. Each weight is read once, as it is stored.
//!
//! A product of one row spends its time reading the weight, so panels would be packed for nothing. Here a register
//! holds neighbouring values of one row of the weight, and a sum is folded at the end. A sum has the same order
//! whatever the number of rows, of weights or of threads is. It is another order than that of `gemm`.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::drive::Target;
use super::{FourBitView, Matrix, Rounding};
use crate::facts::Precision;

/// Vector registers of one instruction set: what a kernel is made of. All functions need that instruction set, and
/// pointers to as many elements as they name.
pub(super) trait Lanes {
    /// An element of the activations as the registers hold them.
    type Element: Copy + Default;
    /// A register of activations or weights.
    type Vector: Copy;
    /// A register of sums.
    type Sum: Copy;
    /// The 16 values of a block.
    type Table: Copy;
    /// Elements of a register.
    const WIDTH: usize;
    /// Rounds or converts an activation.
    fn element(value: f32, precision: Precision) -> Self::Element;
    unsafe fn zero() -> Self::Sum;
    unsafe fn load(at: *const Self::Element) -> Self::Vector;
    /// Weights in f32, rounded to what products are computed in.
    unsafe fn load_f32(at: *const f32, precision: Precision) -> Self::Vector;
    unsafe fn load_bf16(at: *const bf16) -> Self::Vector;
    unsafe fn table(code: &[f32; 16], scale: f32, rounding: Rounding) -> Self::Table;
    /// The elements of even and of odd number of `WIDTH` bytes of indices.
    unsafe fn look_up(table: Self::Table, at: *const u8) -> (Self::Vector, Self::Vector);
    unsafe fn add(sum: Self::Sum, x: Self::Vector, w: Self::Vector) -> Self::Sum;
    /// The sum of all lanes of both.
    unsafe fn fold(a: Self::Sum, b: Self::Sum) -> f32;
}

/// Most rows that are multiplied at the same time.
const ROWS_MAX: usize = 4;
/// Zeros behind each row of activations: a register's last read may begin at its last element.
const PADDING: usize = 64;
/// Columns of a task's block of sums.
const BLOCK: usize = 32;
/// Values of a weight that one task reads at least; waking a thread costs as much.
const TASK_VALUES_MIN: usize = 1 << 16;

/// Rows of activations as the registers of one instruction set read them.
pub(super) struct Rows<E> {
    /// Elements in order: for dense weights.
    plain: Vec<E>,
    /// Elements of even number, then those of odd number, for 4-bit weights.
    halves: [Vec<E>; 2],
    stride: usize,
}

impl<E: Copy + Default> Rows<E> {
    /// `element` is inlined into loops over neighbouring elements.
    fn new<L: Lanes<Element = E>>(job: &Job) -> Rows<E> {
        let stride = (job.depth + PADDING).next_multiple_of(PADDING);
        let halved = |weight: &Weight| is_four_bit(weight, L::WIDTH);
        let room = |wanted: bool| vec![E::default(); if wanted { job.rows * stride } else { 0 }];
        let any = job.weights.iter().any(halved);
        let (mut plain, mut even, mut odd) = (room(!job.weights.iter().all(halved)), room(any), room(any));
        let row = |row: usize| &job.x[row * job.x_stride..][..job.depth];
        for (i, to) in plain.chunks_mut(stride).enumerate() {
            to.iter_mut().zip(row(i)).for_each(|(to, x)| *to = L::element(*x, job.precision));
        }
        for (i, (even, odd)) in even.chunks_mut(stride).zip(odd.chunks_mut(stride)).enumerate() {
            let (pairs, _) = row(i).as_chunks::<2>();
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(pairs) {
                (*even, *odd) = (L::element(pair[0], job.precision), L::element(pair[1], job.precision));
            }
        }
        Rows { plain, halves: [even, odd], stride }
    }
}

/// A weight [n, depth].
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    /// The values. If the scales are nested, it has none of its own.
    pub matrix: Matrix<'a>,
    /// Scales that were quantised, too.
    pub nested: Option<Nested<'a>>,
}

/// Scales that were quantised: `map[code] * absmax + offset`.
#[derive(Clone, Copy)]
pub struct Nested<'a> {
    /// The code of each scale.
    pub codes: &'a [u8],
    /// The scale of each `block` codes.
    pub absmax: &'a [f32],
    /// Codes that share a scale.
    pub block: usize,
    /// The values of the codes.
    pub map: &'a [f32; 256],
    /// Added to all.
    pub offset: f32,
}

impl Nested<'_> {
    /// Writes the scales of some blocks.
    fn read(&self, blocks: Range<usize>, out: &mut Vec<f32>) {
        out.clear();
        let mut at = blocks.start;
        while at < blocks.end {
            let end = blocks.end.min((at / self.block + 1) * self.block);
            let absmax = self.absmax[at / self.block];
            let scale = |code: &u8| self.map[usize::from(*code)] * absmax + self.offset;
            out.extend(self.codes[at..end].iter().map(scale));
            at = end;
        }
    }
}

impl Weight<'_> {
    fn check(&self, depth: usize, precision: Precision) {
        if let (Matrix::FourBit { weight, .. }, Precision::Bf16) = (self.matrix, precision) {
            assert_eq!(weight.rounding, Rounding::Bf16, "products of bf16 have weights in bf16");
        }
        assert_eq!(self.matrix.shape().1, depth, "a weight's columns");
        assert!(is_along_rows(&self.matrix), "a weight's rows lie in order");
        match (self.matrix, self.nested) {
            (Matrix::FourBit { weight, .. }, Some(nested)) => {
                let blocks = (weight.rows * depth).div_ceil(weight.block);
                assert!(nested.codes.len() >= blocks, "{} codes for {blocks} blocks", nested.codes.len());
                assert!(nested.absmax.len() >= blocks.div_ceil(nested.block), "scales of scales");
                assert!(weight.packed.len() * 2 >= weight.rows * depth && weight.block.is_power_of_two());
            }
            (matrix, _) => matrix.check(),
        }
    }
}

/// Whether registers of this width read a weight as 4-bit values.
fn is_four_bit(weight: &Weight, width: usize) -> bool {
    matches!(&weight.matrix, Matrix::FourBit { weight, .. } if fits(weight, width))
}

/// A product: rows of `x` [rows, depth] by weights [n, depth], into columns side by side.
pub(super) struct Job<'a> {
    pub x: &'a [f32],
    pub x_stride: usize,
    pub rows: usize,
    pub depth: usize,
    pub weights: &'a [Weight<'a>],
    pub precision: Precision,
}

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

/// `few` by one of the machine's instruction sets.
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

/// Whether a row's elements are neighbours.
fn is_along_rows(weight: &Matrix) -> bool {
    match *weight {
        Matrix::F32 { col_stride, .. } | Matrix::Bf16 { col_stride, .. } => col_stride == 1,
        Matrix::FourBit { transposed, .. } => !transposed,
    }
}

/// Products of bf16 pairs need weights that are bf16 or become it.
fn run_at(level: Level, job: &Job, c: Target) {
    #[cfg(target_arch = "x86_64")]
    {
        use super::{few_avx2, few_avx512};
        let in_pairs = |weight: &Weight| match &weight.matrix {
            Matrix::Bf16 { .. } => true,
            Matrix::F32 { .. } => false,
            Matrix::FourBit { weight, .. } => {
                weight.rounding == Rounding::Bf16 && fits(weight, few_avx512::Pairs::WIDTH)
            }
        };
        let pairs = job.precision == Precision::Bf16 && job.weights.iter().all(in_pairs);
        match level {
            Level::Pairs if pairs => return run::<few_avx512::Pairs>(job, c, few_avx512::pairs),
            Level::Pairs | Level::Avx512 => return run::<few_avx512::Floats>(job, c, few_avx512::floats),
            Level::Avx2 => return run::<few_avx2::Floats>(job, c, few_avx2::floats),
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

/// What this machine has, or what `HONE_BENCH_GEMM` names of it. Chosen once.
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
        use super::{avx2, avx512};
        match () {
            () if avx512::has_bf16() => return Level::Pairs,
            () if avx512::has_f32() => return Level::Avx512,
            () if avx2::available() => return Level::Avx2,
            () => {}
        }
    }
    Level::Portable
}

/// Whether every register of a 4-bit weight lies in one row and one block, whose number is a shift away.
fn fits(weight: &FourBitView, width: usize) -> bool {
    let block = weight.block;
    weight.cols.is_multiple_of(2 * width) && block.is_multiple_of(2 * width) && block.is_power_of_two()
}

/// The sums of a block: some columns of one weight by up to `ROWS_MAX` rows, `[row * BLOCK + column]`.
type Dots<L> = unsafe fn(&Job, &Columns, &Prepared<L>, Range<usize>, &mut [f32]);

/// The activations for one instruction set.
pub(super) type Prepared<L> = Rows<<L as Lanes>::Element>;

/// Some rows of a weight.
pub(super) struct Columns<'a> {
    matrix: Matrix<'a>,
    range: Range<usize>,
    /// Where the scale of the weight's first block would lie. Those of the range's blocks are there.
    scales: *const f32,
}

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

/// The rows of a block, with their scales.
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

/// (weight, the first column of `c` of all its rows, its rows) of each block.
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

/// `Dots` by the instructions of `L`.
///
/// # Safety
/// The machine has them; the job's shapes were checked.
#[inline(always)]
pub(super) unsafe fn dots<L: Lanes>(
    job: &Job,
    columns: &Columns,
    x: &Prepared<L>,
    rows: Range<usize>,
    sums: &mut [f32],
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match rows.len() {
            1 => columns_by::<L, 1, 4>(job, columns, x, rows.start, sums),
            2 => columns_by::<L, 2, 2>(job, columns, x, rows.start, sums),
            3 => columns_by::<L, 3, 2>(job, columns, x, rows.start, sums),
            _ => columns_by::<L, 4, 2>(job, columns, x, rows.start, sums),
        }
    }
}

/// `C` columns at a time, and the last ones alone.
#[inline(always)]
unsafe fn columns_by<L: Lanes, const R: usize, const C: usize>(
    job: &Job,
    columns: &Columns,
    x: &Prepared<L>,
    row: usize,
    sums: &mut [f32],
) {
    let range = &columns.range;
    let whole = range.start + range.len() / C * C;
    // SAFETY: guaranteed by the caller.
    unsafe {
        for column in (range.start..whole).step_by(C) {
            let found = tile::<L, R, C>(job, columns, column, x, row);
            for (row, found) in found.iter().enumerate() {
                sums[row * BLOCK + column - range.start..][..C].copy_from_slice(found);
            }
        }
        for column in whole..range.end {
            let found = tile::<L, R, 1>(job, columns, column, x, row);
            for (row, found) in found.iter().enumerate() {
                sums[row * BLOCK + column - range.start] = found[0];
            }
        }
    }
}

/// `R` rows by `C` rows of the weight.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
    job: &Job,
    columns: &Columns,
    column: usize,
    x: &Prepared<L>,
    row: usize,
) -> [[f32; C]; R] {
    // SAFETY: guaranteed by the caller; a dense row has `depth` elements.
    unsafe {
        match columns.matrix {
            Matrix::FourBit { weight, .. } if fits(&weight, L::WIDTH) => {
                four_bit::<L, R, C>(&weight, columns.scales, column, x, row)
            }
            Matrix::FourBit { weight, .. } => {
                let mut values = vec![0f32; C * job.depth];
                let (from, to) = (column * job.depth, (column + C) * job.depth);
                let scale = |block: usize| *columns.scales.wrapping_add(block);
                let (first, last) = (from / weight.block, to.div_ceil(weight.block));
                let absmax: Vec<f32> = (first..last).map(scale).collect();
                let packed = &weight.packed[first * weight.block / 2..];
                let near = FourBitView { packed, absmax: &absmax, ..weight };
                near.read(from - first * weight.block, &mut values);
                dense::<L, f32, R, C>(values.as_ptr(), job.depth, job, x, row)
            }
            Matrix::F32 { data, row_stride, .. } => {
                dense::<L, f32, R, C>(data.as_ptr().add(column * row_stride), row_stride, job, x, row)
            }
            Matrix::Bf16 { data, row_stride, .. } => {
                dense::<L, bf16, R, C>(data.as_ptr().add(column * row_stride), row_stride, job, x, row)
            }
        }
    }
}

/// `tile` of a 4-bit weight that `fits`.
#[allow(clippy::needless_range_loop)] // Iterators are functions without the instruction set.
#[inline(always)]
unsafe fn four_bit<L: Lanes, const R: usize, const C: usize>(
    weight: &FourBitView,
    scales: *const f32,
    column: usize,
    x: &Prepared<L>,
    row: usize,
) -> [[f32; C]; R] {
    let (depth, unit) = (weight.cols, 2 * L::WIDTH);
    // Elements of a row that certainly have one scale.
    let run = if depth.is_multiple_of(weight.block) { weight.block } else { unit };
    let shift = weight.block.trailing_zeros();
    let (stride, even, odd) = (x.stride, x.halves[0].as_ptr(), x.halves[1].as_ptr());
    let (even, odd) = (even.wrapping_add(row * stride), odd.wrapping_add(row * stride));
    // Loops over arrays, no closures or iterators: those are functions without the instruction set.
    // SAFETY: guaranteed by the caller; a unit lies in one row and one block.
    unsafe {
        let mut sums = [[[L::zero(); 2]; C]; R];
        for start in (0..depth).step_by(run) {
            let scale = *scales.wrapping_add((column * depth + start) >> shift);
            let mut tables = [L::table(weight.code, scale, weight.rounding); C];
            for c in 1..C {
                let block = ((column + c) * depth + start) >> shift;
                tables[c] = L::table(weight.code, *scales.wrapping_add(block), weight.rounding);
            }
            for at in (start..start + run).step_by(unit) {
                let mut x = [[L::load(even.add(at / 2)), L::load(odd.add(at / 2))]; R];
                for r in 1..R {
                    let at = r * stride + at / 2;
                    x[r] = [L::load(even.add(at)), L::load(odd.add(at))];
                }
                for c in 0..C {
                    let bytes = weight.packed.as_ptr().add(((column + c) * depth + at) / 2);
                    let (first, second) = L::look_up(tables[c], bytes);
                    for r in 0..R {
                        sums[r][c][0] = L::add(sums[r][c][0], x[r][0], first);
                        sums[r][c][1] = L::add(sums[r][c][1], x[r][1], second);
                    }
                }
            }
        }
        folded::<L, R, C>(sums)
    }
}

/// The sums of all lanes.
#[allow(clippy::needless_range_loop)] // Iterators are functions without the instruction set.
#[inline(always)]
unsafe fn folded<L: Lanes, const R: usize, const C: usize>(sums: [[[L::Sum; 2]; C]; R]) -> [[f32; C]; R] {
    let mut out = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            // SAFETY: guaranteed by the caller.
            out[r][c] = unsafe { L::fold(sums[r][c][0], sums[r][c][1]) };
        }
    }
    out
}

/// A dense weight's type, as registers load it.
trait Stored<L: Lanes>: Copy + Default {
    unsafe fn load(at: *const Self, precision: Precision) -> L::Vector;
}

impl<L: Lanes> Stored<L> for f32 {
    #[inline(always)]
    unsafe fn load(at: *const f32, precision: Precision) -> L::Vector {
        // SAFETY: guaranteed by the caller.
        unsafe { L::load_f32(at, precision) }
    }
}

impl<L: Lanes> Stored<L> for bf16 {
    #[inline(always)]
    unsafe fn load(at: *const bf16, _: Precision) -> L::Vector {
        // SAFETY: guaranteed by the caller.
        unsafe { L::load_bf16(at) }
    }
}

/// Adds a unit of `C` rows of a weight, the first of which begins at `weight`.
#[allow(clippy::needless_range_loop)] // Iterators are functions without the instruction set.
#[inline(always)]
unsafe fn unit<L: Lanes, T: Stored<L>, const R: usize, const C: usize>(
    sums: &mut [[[L::Sum; 2]; C]; R],
    x: *const L::Element,
    x_stride: usize,
    weight: *const T,
    stride: usize,
    precision: Precision,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        for half in 0..2 {
            let x = x.add(half * L::WIDTH);
            let mut rows = [L::load(x); R];
            for r in 1..R {
                rows[r] = L::load(x.add(r * x_stride));
            }
            for c in 0..C {
                let w = T::load(weight.add(c * stride + half * L::WIDTH), precision);
                for r in 0..R {
                    sums[r][c][half] = L::add(sums[r][c][half], rows[r], w);
                }
            }
        }
    }
}

/// `tile` of rows of `depth` values that lie `stride` apart.
#[inline(always)]
unsafe fn dense<L: Lanes, T: Stored<L>, const R: usize, const C: usize>(
    weight: *const T,
    stride: usize,
    job: &Job,
    x: &Prepared<L>,
    row: usize,
) -> [[f32; C]; R] {
    let (width, plain) = (2 * L::WIDTH, x.plain.as_ptr().wrapping_add(row * x.stride));
    let whole = job.depth / width * width;
    // SAFETY: guaranteed by the caller; the last elements are copied, with zeros behind them.
    unsafe {
        let mut sums = [[[L::zero(); 2]; C]; R];
        for at in (0..whole).step_by(width) {
            unit::<L, T, R, C>(&mut sums, plain.add(at), x.stride, weight.add(at), stride, job.precision);
        }
        if whole < job.depth {
            let mut rest = [[T::default(); 2 * WIDTH_MAX]; C];
            for (c, rest) in rest.iter_mut().enumerate() {
                let from = weight.add(c * stride + whole);
                std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), job.depth - whole);
            }
            let (from, stride) = (rest.as_ptr().cast(), 2 * WIDTH_MAX);
            unit::<L, T, R, C>(&mut sums, plain.add(whole), x.stride, from, stride, job.precision);
        }
        folded::<L, R, C>(sums)
    }
}

/// Elements of the widest register.
const WIDTH_MAX: usize = 32;

/// Eight lanes in plain Rust.
pub(super) struct Portable;

impl Lanes for Portable {
    type Element = f32;
    type Vector = [f32; 8];
    type Sum = [f32; 8];
    type Table = [f32; 16];
    const WIDTH: usize = 8;

    #[inline(always)]
    fn element(value: f32, precision: Precision) -> f32 {
        rounded(value, precision)
    }
    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> [f32; 8] {
        // SAFETY: guaranteed by the caller.
        unsafe { at.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f32(at: *const f32, precision: Precision) -> [f32; 8] {
        // SAFETY: guaranteed by the caller.
        unsafe { Self::load(at) }.map(|value| rounded(value, precision))
    }
    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> [f32; 8] {
        // SAFETY: guaranteed by the caller.
        unsafe { at.cast::<[bf16; 8]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn table(code: &[f32; 16], scale: f32, rounding: Rounding) -> [f32; 16] {
        code.map(|code| rounding.apply(code * scale))
    }
    #[inline(always)]
    unsafe fn look_up(table: [f32; 16], at: *const u8) -> ([f32; 8], [f32; 8]) {
        // SAFETY: guaranteed by the caller.
        let bytes = unsafe { at.cast::<[u8; 8]>().read_unaligned() };
        (bytes.map(|byte| table[usize::from(byte >> 4)]), bytes.map(|byte| table[usize::from(byte & 15)]))
    }
    #[inline(always)]
    unsafe fn add(sum: [f32; 8], x: [f32; 8], w: [f32; 8]) -> [f32; 8] {
        // Without the instruction, a fused product is a slow library call.
        const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        std::array::from_fn(|i| if FUSED { x[i].mul_add(w[i], sum[i]) } else { sum[i] + x[i] * w[i] })
    }
    #[inline(always)]
    unsafe fn fold(a: [f32; 8], b: [f32; 8]) -> f32 {
        let mut lanes: [f32; 8] = std::array::from_fn(|i| a[i] + b[i]);
        for width in [4, 2, 1] {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        lanes[0]
    }
}

/// An activation as products of this precision take it.
#[inline(always)]
pub(super) fn rounded(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => value,
        Precision::Bf16 | Precision::Fp8 => f32::from_bits(u32::from(bf16_bits(value)) << 16),
    }
}

/// The nearest bf16, ties to even, without a branch: a loop over it becomes vector code. NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

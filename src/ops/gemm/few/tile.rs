//! Some rows of activations by some rows of a weight -> their sums, by the registers of one instruction set.

use std::ops::Range;

use half::bf16;

use super::weight::{Weight, fits, is_four_bit};
use crate::facts::Precision;
use crate::ops::gemm::{FourBitView, Matrix, Rounding};

/// The vector registers of one instruction set, from which a kernel is built. All functions need that instruction set,
/// and pointers to as many elements as they name.
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
    /// Loads weights in f32, rounded to the type in which products are computed.
    unsafe fn load_f32(at: *const f32, precision: Precision) -> Self::Vector;
    unsafe fn load_bf16(at: *const bf16) -> Self::Vector;
    unsafe fn table(code: &[f32; 16], scale: f32, rounding: Rounding) -> Self::Table;
    /// Returns the elements of even and of odd number of `WIDTH` bytes of indices.
    unsafe fn look_up(table: Self::Table, at: *const u8) -> (Self::Vector, Self::Vector);
    unsafe fn add(sum: Self::Sum, x: Self::Vector, w: Self::Vector) -> Self::Sum;
    /// Returns the sum of all lanes of both.
    unsafe fn fold(a: Self::Sum, b: Self::Sum) -> f32;
}

/// Most rows that are multiplied at the same time.
pub(super) const ROWS_MAX: usize = 4;
/// Zeros behind each row of activations: a register's last read may begin at its last element.
const PADDING: usize = 64;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Columns of a task's block of sums.
pub(super) const BLOCK: usize = 32;

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
    pub(super) fn new<L: Lanes<Element = E>>(job: &Job) -> Rows<E> {
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

/// A product: rows of `x` [rows, depth] by weights [n, depth], into columns side by side.
pub(super) struct Job<'a> {
    pub x: &'a [f32],
    pub x_stride: usize,
    pub rows: usize,
    pub depth: usize,
    pub weights: &'a [Weight<'a>],
    pub precision: Precision,
}

/// The activations for one instruction set.
pub(super) type Prepared<L> = Rows<<L as Lanes>::Element>;

/// Some rows of a weight.
pub(super) struct Columns<'a> {
    pub matrix: Matrix<'a>,
    pub range: Range<usize>,
    /// The address that the scale of the weight's first block would have. Those of the range's blocks are there.
    pub scales: *const f32,
}

/// Computes the sums of some rows by some columns, `[row * BLOCK + column]`, by the instructions of `L`.
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

/// Computes `C` columns at a time, and the last ones one by one.
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

/// Does `tile` of a 4-bit weight that `fits`.
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
                    // The next tile's values lie behind this tile's. The processor does not read that far ahead by
                    // itself.
                    if at / unit % (LINE / L::WIDTH) == 0 {
                        prefetch(bytes.wrapping_add(C * depth / 2));
                    }
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

/// Reads the cache line of an address ahead. The address may lie anywhere.
#[inline(always)]
fn prefetch(at: *const u8) {
    // SAFETY: every x86-64 processor has the instruction, and a prefetch reads nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Returns the sums of all lanes.
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

/// Does `tile` of rows of `depth` values that lie `stride` apart.
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

/// Returns an activation as products of this precision take it.
#[inline(always)]
pub fn rounded(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => value,
        Precision::Bf16 | Precision::Fp8 => f32::from_bits(u32::from(bf16_bits(value)) << 16),
    }
}

/// Returns the nearest bf16, ties to even, without a branch: a loop over it becomes vector code. NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

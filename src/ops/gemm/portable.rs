//! Panels of f32 -> blocks of `c` in plain Rust that the compiler vectorises for NEON, SSE2 or any other target.

use super::Rounding;
use super::drive::{Kernel, LANES, Multiply, Span, TILE_BYTES, Target};
use super::source::{Side, Source};
use crate::facts::Precision;

/// The kernel that runs everywhere.
pub static KERNEL: Kernel =
    Kernel { name: "portable", step: 16, split: false, pack, begin, end, multiply, store };

unsafe fn begin() {}
unsafe fn end() {}

unsafe fn pack(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    fill(source, side, precision, span, out);
}

unsafe fn multiply(job: Multiply) {
    // SAFETY: guaranteed by the caller. Without the instruction, a fused product is a slow library call.
    unsafe { block::<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>(job) }
}

unsafe fn store(sums: *const f32, rows: usize, cols: usize, c: Target) {
    // SAFETY: guaranteed by the caller.
    unsafe { put(sums, rows, cols, c) }
}

/// Multiplies 32 rows as 5 x 6 + 2: 12 sums of 8 lanes, two registers of `b` and one of `a` fill AVX2's 16 registers.
///
/// # Safety
/// The panels and sums of `job` have the lengths that it names; with `FUSED` the machine has fused products.
#[inline(always)]
pub(super) unsafe fn block<const FUSED: bool>(job: Multiply) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        for tile in 0..job.cols.div_ceil(16) {
            let mut row = 0;
            while row < job.rows.min(30) {
                rows::<FUSED, 6>(job, row, tile);
                row += 6;
            }
            if job.rows > 30 {
                rows::<FUSED, 2>(job, 30, tile);
            }
        }
    }
}

/// Multiplies `ROWS` rows with one tile of 16 columns.
#[inline(always)]
unsafe fn rows<const FUSED: bool, const ROWS: usize>(job: Multiply, first: usize, tile: usize) {
    let sum_at = |row: usize| ((first + row) / 16 * 2 + tile) * 256 + (first + row) % 16 * 16;
    let mut sums = [[0f32; 16]; ROWS];
    // SAFETY: the sums are four tiles of 16x16; each panel holds `steps` steps of two tiles.
    unsafe {
        if job.add {
            for (row, sums) in sums.iter_mut().enumerate() {
                *sums = *job.sums.add(sum_at(row)).cast::<[f32; 16]>();
            }
        }
        for step in 0..job.steps {
            let a = job.a.add(step * 2 * TILE_BYTES).cast::<f32>().add(first * 16);
            let b = job.b.add(step * 2 * TILE_BYTES + tile * TILE_BYTES).cast::<[f32; 16]>();
            for word in 0..16 {
                let b = &*b.add(word);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = *a.add(row * 16 + word);
                    for (sum, &b) in sums.iter_mut().zip(b) {
                        *sum = if FUSED { a.mul_add(b, *sum) } else { *sum + a * b };
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            *job.sums.add(sum_at(row)).cast::<[f32; 16]>() = *sums;
        }
    }
}

#[inline(always)]
fn fill(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    let steps = span.depth.div_ceil(16);
    for (index, out) in out.chunks_exact_mut(TILE_BYTES).enumerate() {
        let start = index / 2 % steps * 16;
        let depth = 16.min(span.depth - start);
        let lane = index / (2 * steps) * LANES + index % 2 * 16;
        let lanes = 16.min(span.lanes.saturating_sub(lane));
        let (runs, first, along, at) = if source.along_depth {
            (lanes, span.lane + lane, depth, span.start + start)
        } else {
            (depth, span.start + start, lanes, span.lane + lane)
        };
        let mut rows = [[0f32; 16]; 16];
        for (run, row) in rows.iter_mut().enumerate().take(if along > 0 { runs } else { 0 }) {
            source.read(first + run, at, &mut row[..along]);
        }
        if precision == Precision::Bf16 {
            rows.as_flattened_mut().iter_mut().for_each(|value| *value = Rounding::Bf16.apply(*value));
        }
        let straight = source.along_depth == (side == Side::A);
        for (index, out) in out.chunks_exact_mut(4).enumerate() {
            let (row, col) = (index / 16, index % 16);
            let value = if straight { rows[row][col] } else { rows[col][row] };
            out.copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// Writes sums to `c`, see `drive::Kernel::store`.
///
/// # Safety
/// [rows, cols] lies inside `c`, and no other thread has it.
#[inline(always)]
pub(super) unsafe fn put(sums: *const f32, rows: usize, cols: usize, c: Target) {
    for row in 0..rows {
        for tile in 0..cols.div_ceil(16) {
            let count = 16.min(cols - tile * 16);
            // SAFETY: the sums are four tiles; [rows, cols] lies inside `c`, and only this thread uses it.
            let (sums, to) = unsafe {
                let sums = sums.add((row / 16 * 2 + tile) * 256 + row % 16 * 16);
                let to = c.data.add(row * c.row_stride + tile * 16);
                (std::slice::from_raw_parts(sums, count), std::slice::from_raw_parts_mut(to, count))
            };
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = if c.beta == 0.0 { c.alpha * sum } else { c.alpha * sum + c.beta * *to };
            }
        }
    }
}

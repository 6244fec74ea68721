//! Panels of f32 -> blocks of `c` with AVX2. Packing is written by hand; the product is that of `portable`.
//!
//! Rounding to bf16 and the table of 4-bit codes cost as much as the product does if they are done one element at a
//! time.

use std::arch::x86_64::*;

use super::Rounding;
use super::drive::{Kernel, LANES, Multiply, Span, TILE_BYTES, Target};
use super::portable;
use super::source::{Elements, Side, Source};
use crate::facts::Precision;

/// The kernel for machines with AVX2, FMA and F16C.
pub static KERNEL: Kernel =
    Kernel { name: "avx2", step: 16, split: false, pack, begin, end, multiply, store };

/// Sixteen elements of a run, in two registers.
type Row = [__m256; 2];

/// Returns whether this machine can run [`KERNEL`].
pub fn available() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("fma") && has!("f16c")
}

unsafe fn begin() {}
unsafe fn end() {}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply(job: Multiply) {
    // SAFETY: guaranteed by the caller.
    unsafe { portable::block::<true>(job) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(sums: *const f32, rows: usize, cols: usize, c: Target) {
    // SAFETY: guaranteed by the caller.
    unsafe { portable::put(sums, rows, cols, c) }
}

/// Packs panels of f32. A row of a tile of `a` holds a lane; a row of a tile of `b` holds a depth.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    let steps = span.depth.div_ceil(16);
    assert_eq!(out.len(), span.panels() * steps * 2 * TILE_BYTES);
    let straight = source.along_depth == (side == Side::A);
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
        let mut rows = [[_mm256_setzero_ps(); 2]; 16];
        for (run, row) in rows.iter_mut().enumerate().take(if along > 0 { runs } else { 0 }) {
            // SAFETY: the caller's machine has the features; the run lies inside the operand.
            *row = unsafe { load(source, first + run, at, along) };
            if precision == Precision::Bf16 {
                *row = [round_to_bf16(row[0]), round_to_bf16(row[1])];
            }
        }
        if !straight {
            rows = transpose(&rows);
        }
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(64)) {
            let out = out.as_mut_ptr().cast::<f32>();
            // SAFETY: a row of a tile is 16 floats.
            unsafe {
                _mm256_storeu_ps(out, row[0]);
                _mm256_storeu_ps(out.add(8), row[1]);
            }
        }
    }
}

/// Loads up to 16 elements of a run; the rest is zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(source: &Source, run: usize, start: usize, count: usize) -> Row {
    // SAFETY: sixteen elements from `start` on lie inside the operand in the first three arms; the last reads `count`.
    unsafe {
        match source.elements {
            Elements::F32 { data, run_stride, stride: 1 } if count == 16 => {
                let at = data.as_ptr().add(run * run_stride + start);
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]
            }
            Elements::Bf16 { data, run_stride, stride: 1 } if count == 16 => {
                let at = data.as_ptr().add(run * run_stride + start).cast::<__m128i>();
                [widen(_mm_loadu_si128(at)), widen(_mm_loadu_si128(at.add(1)))]
            }
            Elements::FourBit(weight)
                if count == 16
                    && weight.block.is_multiple_of(16)
                    && (run * weight.cols + start).is_multiple_of(16) =>
            {
                let flat = run * weight.cols + start;
                let scale = _mm256_set1_ps(weight.absmax[flat / weight.block]);
                let codes = weight.code.as_ptr();
                let table = [_mm256_loadu_ps(codes), _mm256_loadu_ps(codes.add(8))]
                    .map(|codes| rounded(_mm256_mul_ps(codes, scale), weight.rounding));
                look_up(table, _mm_loadl_epi64(weight.packed.as_ptr().add(flat / 2).cast()))
            }
            _ => {
                let mut values = [0f32; 16];
                source.read(run, start, &mut values[..count]);
                [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))]
            }
        }
    }
}

/// Maps eight bytes of two codes each, high half first, to sixteen values of a table of sixteen.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: Row, bytes: __m128i) -> Row {
    let bytes = _mm256_cvtepu8_epi32(bytes);
    let (high, low) = (_mm256_srli_epi32::<4>(bytes), _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
    // The order is elements 0-3 and 8-11, then 4-7 and 12-15, because interleaving works inside halves of a
    // register.
    let (outer, inner) = (_mm256_unpacklo_epi32(high, low), _mm256_unpackhi_epi32(high, low));
    [_mm256_permute2x128_si256::<0x20>(outer, inner), _mm256_permute2x128_si256::<0x31>(outer, inner)].map(
        |index| {
            let (first, second) =
                (_mm256_permutevar8x32_ps(table[0], index), _mm256_permutevar8x32_ps(table[1], index));
            // Bit 3 of the index says which half of the table holds the value; a blend selects by the sign bit.
            _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        },
    )
}

/// Does `Rounding::apply` on eight values.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn rounded(values: __m256, rounding: Rounding) -> __m256 {
    match rounding {
        Rounding::None => values,
        Rounding::Bf16 => round_to_bf16(values),
        Rounding::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
    }
}

/// Rounds to the nearest bf16, ties to even. NaN stays NaN: the upper bits of its payload are kept and its quiet
/// bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn round_to_bf16(values: __m256) -> __m256 {
    let bits = _mm256_castps_si256(values);
    let even = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let kept = _mm256_and_si256(_mm256_blendv_epi8(sum, quiet, nan), _mm256_set1_epi32(!0xffff));
    _mm256_castsi256_ps(kept)
}

/// Widens eight bf16 to floats.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

/// Transposes 16 x 16 as four blocks of 8 x 8, of which the two off the diagonal are swapped.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: &[Row; 16]) -> [Row; 16] {
    let mut out = *rows;
    for across in 0..2 {
        for down in 0..2 {
            let block = transpose_8x8(std::array::from_fn(|row| rows[down * 8 + row][across]));
            for (row, value) in block.into_iter().enumerate() {
                out[across * 8 + row][down] = value;
            }
        }
    }
    out
}

#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8x8(a: [__m256; 8]) -> [__m256; 8] {
    // Interleaves pairs of rows, then pairs of pairs, inside halves of a register; then exchanges the halves.
    let pairs: [__m256; 8] = std::array::from_fn(|i| {
        let (first, second) = (a[i / 2 * 2], a[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm256_unpacklo_ps(first, second) } else { _mm256_unpackhi_ps(first, second) }
    });
    // The first register holds columns 0 and 4 of four rows, the second columns 1 and 5, and so on.
    let fours = |at: usize| {
        let (low, high) = (pairs[at], pairs[at + 1]);
        let (low_next, high_next) = (pairs[at + 2], pairs[at + 3]);
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(low, low_next),
            _mm256_shuffle_ps::<0b11_10_11_10>(low, low_next),
            _mm256_shuffle_ps::<0b01_00_01_00>(high, high_next),
            _mm256_shuffle_ps::<0b11_10_11_10>(high, high_next),
        ]
    };
    let (upper, lower) = (fours(0), fours(4));
    std::array::from_fn(|column| match column < 4 {
        true => _mm256_permute2f128_ps::<0x20>(upper[column], lower[column]),
        false => _mm256_permute2f128_ps::<0x31>(upper[column - 4], lower[column - 4]),
    })
}

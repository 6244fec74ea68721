//! The registers of `few` with AVX2: eight f32.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::tile::{self, Columns, Job, Lanes, Prepared};

use crate::facts::Precision;
use crate::ops::gemm::{Rounding, avx2};

/// Eight f32.
pub struct Floats;

/// Does `tile::dots` of f32.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn floats(
    job: &Job,
    columns: &Columns,
    x: &Prepared<Floats>,
    rows: Range<usize>,
    sums: &mut [f32],
) {
    // SAFETY: guaranteed by the caller.
    unsafe { tile::dots::<Floats>(job, columns, x, rows, sums) }
}

impl Lanes for Floats {
    type Element = f32;
    type Vector = __m256;
    type Sum = __m256;
    type Table = [__m256; 2];
    const WIDTH: usize = 8;

    #[inline(always)]
    fn element(value: f32, precision: Precision) -> f32 {
        tile::rounded(value, precision)
    }
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_f32(at: *const f32, precision: Precision) -> __m256 {
        let rounding = if precision == Precision::Bf16 { Rounding::Bf16 } else { Rounding::None };
        // SAFETY: guaranteed by the caller.
        unsafe { avx2::rounded(_mm256_loadu_ps(at), rounding) }
    }
    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    unsafe fn table(code: &[f32; 16], scale: f32, rounding: Rounding) -> [__m256; 2] {
        // SAFETY: guaranteed by the caller; the code has two registers.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let (low, high) = (_mm256_loadu_ps(code.as_ptr()), _mm256_loadu_ps(code.as_ptr().add(8)));
            let (low, high) = (_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale));
            [avx2::rounded(low, rounding), avx2::rounded(high, rounding)]
        }
    }
    #[inline(always)]
    unsafe fn look_up(table: [__m256; 2], at: *const u8) -> (__m256, __m256) {
        // SAFETY: guaranteed by the caller. The permutation reads only the low three bits of each index; the
        // fourth becomes the sign, by which the halves of the table are chosen.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()));
            (values(table, _mm256_srli_epi32::<4>(bytes)), values(table, bytes))
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256, x: __m256, w: __m256) -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_fmadd_ps(x, w, sum) }
    }
    #[inline(always)]
    unsafe fn fold(a: __m256, b: __m256) -> f32 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let sum = _mm256_add_ps(a, b);
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
        }
    }
}

/// Returns the values of eight indices, whose low four bits are read.
#[inline]
#[target_feature(enable = "avx2")]
fn values([low, high]: [__m256; 2], index: __m256i) -> __m256 {
    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
    let (low, high) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
    _mm256_blendv_ps(low, high, upper)
}

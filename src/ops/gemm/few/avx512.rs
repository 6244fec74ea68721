//! The registers of `few` with AVX-512: f32, and pairs of bf16.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

use half::bf16;

use super::tile::{self, Columns, Job, Lanes, Prepared};
use crate::facts::Precision;
use crate::ops::gemm::Rounding;
use crate::ops::gemm::pack_bf16::round;

/// Sixteen f32.
pub struct Floats;
/// Thirty-two bf16, whose products are added in pairs.
pub struct Pairs;

/// Does `tile::dots` of f32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
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

/// Does `tile::dots` of pairs of bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn pairs(job: &Job, columns: &Columns, x: &Prepared<Pairs>, rows: Range<usize>, sums: &mut [f32]) {
    // SAFETY: guaranteed by the caller.
    unsafe { tile::dots::<Pairs>(job, columns, x, rows, sums) }
}

impl Lanes for Floats {
    type Element = f32;
    type Vector = __m512;
    type Sum = __m512;
    type Table = __m512;
    const WIDTH: usize = 16;

    #[inline(always)]
    fn element(value: f32, precision: Precision) -> f32 {
        tile::rounded(value, precision)
    }
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_f32(at: *const f32, precision: Precision) -> __m512 {
        let rounding = if precision == Precision::Bf16 { Rounding::Bf16 } else { Rounding::None };
        // SAFETY: guaranteed by the caller.
        unsafe { round(_mm512_loadu_ps(at), rounding) }
    }
    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    unsafe fn table(code: &[f32; 16], scale: f32, rounding: Rounding) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { round(_mm512_mul_ps(_mm512_loadu_ps(code.as_ptr()), _mm512_set1_ps(scale)), rounding) }
    }
    #[inline(always)]
    unsafe fn look_up(table: __m512, at: *const u8) -> (__m512, __m512) {
        // SAFETY: guaranteed by the caller. The permutation reads only the low four bits of each index.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()));
            let first = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            (first, _mm512_permutexvar_ps(bytes, table))
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, x: __m512, w: __m512) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_fmadd_ps(x, w, sum) }
    }
    #[inline(always)]
    unsafe fn fold(a: __m512, b: __m512) -> f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_reduce_add_ps(_mm512_add_ps(a, b)) }
    }
}

impl Lanes for Pairs {
    type Element = bf16;
    type Vector = __m512i;
    type Sum = __m512;
    type Table = __m512i;
    const WIDTH: usize = 32;

    #[inline(always)]
    fn element(value: f32, _: Precision) -> bf16 {
        bf16::from_bits(tile::bf16_bits(value))
    }
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(at: *const bf16) -> __m512i {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f32(_: *const f32, _: Precision) -> __m512i {
        unreachable!("products with weights in f32 are made in f32")
    }
    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> __m512i {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    /// Returns the 16 values in bf16, twice: the permutation reads five bits of an index. The conversion makes the
    /// smallest values zero, as the sum of pairs itself does. Weights that are not rounded to bf16 never come here.
    #[inline(always)]
    unsafe fn table(code: &[f32; 16], scale: f32, _: Rounding) -> __m512i {
        // SAFETY: guaranteed by the caller; both types are 256 bits of plain data.
        unsafe {
            let values = _mm512_mul_ps(_mm512_loadu_ps(code.as_ptr()), _mm512_set1_ps(scale));
            _mm512_broadcast_i64x4(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values)))
        }
    }
    #[inline(always)]
    unsafe fn look_up(table: __m512i, at: *const u8) -> (__m512i, __m512i) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at.cast()));
            let first = _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(bytes), table);
            (first, _mm512_permutexvar_epi16(bytes, table))
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: guaranteed by the caller; both types are 512 bits of plain data.
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(x), transmute::<__m512i, __m512bh>(w)) }
    }
    #[inline(always)]
    unsafe fn fold(a: __m512, b: __m512) -> f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_reduce_add_ps(_mm512_add_ps(a, b)) }
    }
}

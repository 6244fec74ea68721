//! Panels of f32, or of pairs of bf16, -> blocks of `c` with AVX-512 registers.

use super::drive::{Kernel, LANES, Multiply, Span, TILE_BYTES, Target};
use super::pack_bf16::{self, transpose_16x16};
use super::source::{Elements, Side, Source};
use crate::facts::Precision;
use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;
use std::mem::transmute;

/// The kernel for f32 products.
pub static F32: Kernel =
    Kernel { name: "avx512", step: 16, split: false, pack, begin, end, multiply: multiply_f32, store };

/// The kernel for products of bf16 pairs, summed in f32.
pub static BF16: Kernel = Kernel {
    name: "avx512-bf16",
    step: pack_bf16::STEP,
    split: true,
    pack: pack_bf16::pack,
    begin,
    end,
    multiply: multiply_pairs,
    store,
};

/// Returns whether this machine can run `F32`.
pub fn has_f32() -> bool {
    has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq")
}

/// Returns whether this machine can run `BF16`.
pub fn has_bf16() -> bool {
    has_f32() && has!("avx512bf16")
}

/// Returns whether `BF16` is faster than `F32`. AMD multiplies pairs at twice the rate of f32; Intel (Sapphire Rapids,
/// measured) at half of it.
pub fn pairs_are_fast() -> bool {
    let vendor = __cpuid(0);
    has_bf16()
        && [vendor.ebx, vendor.edx, vendor.ecx] == [b"Auth", b"enti", b"cAMD"].map(|&s| u32::from_le_bytes(s))
}

unsafe fn begin() {}
unsafe fn end() {}

/// The operation on one 32-bit word of each lane.
trait Product {
    /// # Safety
    /// Needs the features of the kernel.
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512;
}

struct Fma;

impl Product for Fma {
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

struct Pairs;

impl Product for Pairs {
    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: guaranteed by the caller; both types are 512 bits of plain data.
        unsafe {
            let (a, b) = (transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn multiply_f32(job: Multiply) {
    // SAFETY: guaranteed by the caller.
    unsafe { multiply::<Fma>(job) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn multiply_pairs(job: Multiply) {
    // SAFETY: guaranteed by the caller.
    unsafe { multiply::<Pairs>(job) }
}

/// Multiplies 32 rows as 11 + 11 + 10: 22 sums, two registers of `b` and one of `a` fill the register file and hide
/// the latency.
#[inline(always)]
unsafe fn multiply<P: Product>(job: Multiply) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        rows::<P, 0, 11>(job);
        if job.rows > 11 {
            rows::<P, 11, 11>(job);
        }
        if job.rows > 22 {
            rows::<P, 22, 10>(job);
        }
    }
}

#[inline(always)]
unsafe fn rows<P: Product, const FIRST: usize, const ROWS: usize>(job: Multiply) {
    // A row of a block, or of a tile of `a`: tiles have 16 rows of 64 bytes.
    let sum_at = |row: usize, tile: usize| (row / 16 * 2 + tile) * 256 + row % 16 * 16;
    // SAFETY: the sums are four tiles; each panel holds `steps` steps of two tiles.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        if job.add {
            for (row, sums) in sums.iter_mut().enumerate() {
                sums[0] = _mm512_loadu_ps(job.sums.add(sum_at(FIRST + row, 0)));
                sums[1] = _mm512_loadu_ps(job.sums.add(sum_at(FIRST + row, 1)));
            }
        }
        for step in 0..job.steps {
            let a = job.a.add(step * 2 * TILE_BYTES).cast::<f32>();
            let b = job.b.add(step * 2 * TILE_BYTES).cast::<f32>();
            for word in 0..16 {
                let b0 = _mm512_loadu_ps(b.add(word * 16));
                let b1 = _mm512_loadu_ps(b.add(256 + word * 16));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add((FIRST + row) * 16 + word));
                    sums[0] = P::add(sums[0], a, b0);
                    sums[1] = P::add(sums[1], a, b1);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(job.sums.add(sum_at(FIRST + row, 0)), sums[0]);
            _mm512_storeu_ps(job.sums.add(sum_at(FIRST + row, 1)), sums[1]);
        }
    }
}

/// Packs panels of f32. A row of a tile of `a` holds a lane; a row of a tile of `b` holds a depth.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    let steps = span.depth.div_ceil(16);
    assert_eq!(out.len(), span.panels() * steps * 2 * TILE_BYTES);
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
        let mut rows = [_mm512_setzero_si512(); 16];
        for (run, row) in rows.iter_mut().enumerate().take(runs) {
            if along == 0 {
                break;
            }
            // SAFETY: the caller's machine has the features; the run lies inside the operand.
            *row = unsafe { load(source, first + run, at, along) };
            if precision == Precision::Bf16 {
                *row =
                    _mm512_castps_si512(pack_bf16::round(_mm512_castsi512_ps(*row), super::Rounding::Bf16));
            }
        }
        if source.along_depth != (side == Side::A) {
            rows = transpose_16x16(&rows);
        }
        let out = out.as_mut_ptr().cast::<__m512i>();
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: a tile is 16 registers, aligned to 64 bytes.
            unsafe { out.add(index).write(*row) };
        }
    }
}

/// Loads up to 16 elements of a run; the rest of the register is zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn load(source: &Source, run: usize, start: usize, count: usize) -> __m512i {
    // SAFETY: the run lies inside the operand; masked elements are not touched.
    unsafe {
        match source.elements {
            Elements::F32 { data, run_stride, stride: 1 } => {
                let at = data.as_ptr().add(run * run_stride + start);
                _mm512_castps_si512(_mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, at))
            }
            Elements::FourBit(weight)
                if count == 16
                    && weight.block.is_multiple_of(16)
                    && (run * weight.cols + start).is_multiple_of(16) =>
            {
                let flat = run * weight.cols + start;
                let scale = _mm512_set1_ps(weight.absmax[flat / weight.block]);
                let table = _mm512_mul_ps(_mm512_loadu_ps(weight.code.as_ptr()), scale);
                let table = pack_bf16::round(table, weight.rounding);
                // Each byte becomes two 32-bit indices, high half first; the permutation reads only their low four
                // bits.
                let bytes =
                    _mm512_cvtepu8_epi64(_mm_loadl_epi64(weight.packed.as_ptr().add(flat / 2).cast()));
                let index = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
                _mm512_castps_si512(_mm512_permutexvar_ps(index, table))
            }
            _ => {
                let mut values = [0f32; 16];
                source.read(run, start, &mut values[..count]);
                _mm512_castps_si512(_mm512_loadu_ps(values.as_ptr()))
            }
        }
    }
}

/// Writes a block of sums into `c`; see `drive::Kernel::store`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub unsafe fn store(sums: *const f32, rows: usize, cols: usize, c: Target) {
    let alpha = _mm512_set1_ps(c.alpha);
    let beta = _mm512_set1_ps(c.beta);
    for row in 0..rows {
        for tile in 0..cols.div_ceil(16) {
            let mask = ((1u32 << 16.min(cols - tile * 16)) - 1) as u16;
            // SAFETY: [rows, cols] lies inside `c`; masked elements are not touched.
            unsafe {
                let to = c.data.add(row * c.row_stride + tile * 16);
                let sum = _mm512_loadu_ps(sums.add((row / 16 * 2 + tile) * 256 + row % 16 * 16));
                let mut value = _mm512_mul_ps(sum, alpha);
                if c.beta != 0.0 {
                    value = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to), beta, value);
                }
                _mm512_mask_storeu_ps(to, mask, value);
            }
        }
    }
}

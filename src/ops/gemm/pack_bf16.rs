//! An operand -> panels of bf16 pairs with AVX-512: f32 is split into planes, 4-bit codes go straight to bf16.
//!
//! A step is 32 lanes by 32 depths; a register holds 32 elements. Tiles of `a` keep a lane in a row (32 depths);
//! tiles of `b` keep a pair of depths in a row (16 lanes, the two depths of a lane side by side).
//! f32 = hi + mid + lo in bf16, each the rest of the one before, rounded: 3 x 8 bits hold all 24.

use super::drive::{LANES, Span, TILE_BYTES};
use super::source::{Elements, Side, Source};
use super::{FourBitView, Precision, Rounding};
use half::bf16;
use std::arch::x86_64::*;

/// Elements of depth in a step, lanes in a panel, elements in a register.
pub const STEP: usize = 32;
const TILE_LANES: usize = 16;

/// Packs one panel, see `drive::Kernel::pack`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn pack(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    let planes = source.planes(precision);
    assert_eq!(out.len(), span.depth.div_ceil(STEP) * planes * 2 * TILE_BYTES);
    let layout = Layout { side, along_depth: source.along_depth, span };
    // SAFETY: the caller has these features; `out` has the size of the panel and is aligned to 64 bytes.
    unsafe {
        match (source.elements, planes) {
            (Elements::F32 { data, run_stride, stride: 1 }, 1) => {
                layout.fill::<1>(&Floats { data, run_stride }, out)
            }
            (Elements::F32 { data, run_stride, stride: 1 }, 3) => {
                layout.fill::<3>(&Floats { data, run_stride }, out)
            }
            (Elements::Bf16 { data, run_stride, stride: 1 }, 1) => {
                layout.fill::<1>(&Halves { data, run_stride }, out)
            }
            (Elements::FourBit(weight), 1) => layout.fill::<1>(&Codes { weight, source }, out),
            (Elements::FourBit(weight), 2) => layout.fill::<2>(&Codes { weight, source }, out),
            (Elements::FourBit(weight), 3) => layout.fill::<3>(&Codes { weight, source }, out),
            (_, 1) => layout.fill::<1>(&Any(source), out),
            (_, 3) => layout.fill::<3>(&Any(source), out),
            (_, planes) => unreachable!("{planes} planes"),
        }
    }
}

/// Reads 32 elements of a run as planes of bf16.
trait Runs {
    /// Elements after `count` are zero.
    ///
    /// # Safety
    /// Needs the features of `pack`, and `count <= 32` elements from `start` on inside the operand.
    unsafe fn load<const P: usize>(&self, run: usize, start: usize, count: usize) -> [__m512i; P];
}

struct Layout {
    side: Side,
    along_depth: bool,
    span: Span,
}

impl Layout {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill<const P: usize>(&self, runs: &impl Runs, out: &mut [u8]) {
        let span = self.span;
        for (step, out) in out.chunks_exact_mut(P * 2 * TILE_BYTES).enumerate() {
            let start = span.start + step * STEP;
            let depth = STEP.min(span.start + span.depth - start);
            let out = out.as_mut_ptr().cast::<__m512i>();
            // SAFETY: features as above; `out` has room for the step; lanes and depths stay inside the span.
            unsafe {
                if self.along_depth {
                    self.fill_along_depth::<P>(runs, start, depth, out);
                } else {
                    self.fill_across_lanes::<P>(runs, start, depth, out);
                }
            }
        }
    }

    /// A register is one lane: a row of a tile of `a`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill_along_depth<const P: usize>(
        &self,
        runs: &impl Runs,
        start: usize,
        depth: usize,
        out: *mut __m512i,
    ) {
        for tile in 0..LANES / TILE_LANES {
            let mut rows = [[_mm512_setzero_si512(); TILE_LANES]; P];
            for row in 0..TILE_LANES {
                let lane = tile * TILE_LANES + row;
                if lane < self.span.lanes {
                    // SAFETY: see `fill`.
                    let loaded = unsafe { runs.load::<P>(self.span.lane + lane, start, depth) };
                    for plane in 0..P {
                        rows[plane][row] = loaded[plane];
                    }
                }
            }
            for plane in 0..P {
                // SAFETY: see `fill`.
                unsafe { self.put(&rows[plane], self.side == Side::B, plane, tile, out) };
            }
        }
    }

    /// Two registers are two depths; interleaved they are a row of both tiles of `b`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill_across_lanes<const P: usize>(
        &self,
        runs: &impl Runs,
        start: usize,
        depth: usize,
        out: *mut __m512i,
    ) {
        let mut rows = [[[_mm512_setzero_si512(); TILE_LANES]; 2]; P];
        let low = interleave(0);
        let high = interleave(16);
        for row in 0..depth.div_ceil(2) {
            let at = start + 2 * row;
            // SAFETY: see `fill`.
            let even = unsafe { runs.load::<P>(at, self.span.lane, self.span.lanes) };
            let odd = if 2 * row + 1 < depth {
                // SAFETY: see `fill`.
                unsafe { runs.load::<P>(at + 1, self.span.lane, self.span.lanes) }
            } else {
                [_mm512_setzero_si512(); P]
            };
            for plane in 0..P {
                rows[plane][0][row] = _mm512_permutex2var_epi16(even[plane], low, odd[plane]);
                rows[plane][1][row] = _mm512_permutex2var_epi16(even[plane], high, odd[plane]);
            }
        }
        for (plane, tiles) in rows.iter().enumerate() {
            for (tile, rows) in tiles.iter().enumerate() {
                // SAFETY: see `fill`.
                unsafe { self.put(rows, self.side == Side::A, plane, tile, out) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn put(
        &self,
        rows: &[__m512i; 16],
        transpose: bool,
        plane: usize,
        tile: usize,
        out: *mut __m512i,
    ) {
        let rows = if transpose { transpose_16x16(rows) } else { *rows };
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: see `fill`; a tile is 16 registers.
            unsafe { out.add((plane * 2 + tile) * 16 + index).write(*row) };
        }
    }
}

/// Word indices that pair the elements `first..first + 16` of two registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(first: i16) -> __m512i {
    let words: [i16; 32] = std::array::from_fn(|index| first + (index / 2) as i16 + (index % 2) as i16 * 32);
    // SAFETY: 64 bytes are read from an array of 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// Transposes 16x16 words of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose_16x16(rows: &[__m512i; 16]) -> [__m512i; 16] {
    let mut a = *rows;
    let mut b = a;
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // Register 4 i + j now holds, in its four 128-bit parts, columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3.
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[j], a[4 + j]);
        let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[j], a[4 + j]);
        let low_next = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[8 + j], a[12 + j]);
        let odd_next = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[8 + j], a[12 + j]);
        b[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low, low_next);
        b[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low, low_next);
        b[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd_next);
        b[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd_next);
    }
    b
}

/// 32 floats as planes of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn split<const P: usize>(mut low: __m512, mut high: __m512) -> [__m512i; P] {
    let mut planes = [_mm512_setzero_si512(); P];
    for (index, plane) in planes.iter_mut().enumerate() {
        // SAFETY: both are 512 bits of plain data.
        *plane = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
        if index + 1 < P {
            low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(*plane)));
            high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(*plane)));
        }
    }
    planes
}

/// 16 bf16 as floats.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn widen(halves: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

fn mask(count: usize) -> u32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

struct Floats<'a> {
    data: &'a [f32],
    run_stride: usize,
}

impl Runs for Floats<'_> {
    #[inline(always)]
    unsafe fn load<const P: usize>(&self, run: usize, start: usize, count: usize) -> [__m512i; P] {
        let mask = mask(count);
        // SAFETY: masked elements are not touched, the others lie inside the data.
        unsafe {
            let at = self.data.as_ptr().add(run * self.run_stride + start);
            let low = _mm512_maskz_loadu_ps(mask as u16, at);
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, at.wrapping_add(16));
            split(low, high)
        }
    }
}

struct Halves<'a> {
    data: &'a [bf16],
    run_stride: usize,
}

impl Runs for Halves<'_> {
    #[inline(always)]
    unsafe fn load<const P: usize>(&self, run: usize, start: usize, count: usize) -> [__m512i; P] {
        // SAFETY: masked elements are not touched, the others lie inside the data.
        unsafe {
            let at = self.data.as_ptr().add(run * self.run_stride + start).cast();
            [_mm512_maskz_loadu_epi16(mask(count), at); P]
        }
    }
}

struct Codes<'a> {
    weight: FourBitView<'a>,
    source: &'a Source<'a>,
}

impl Runs for Codes<'_> {
    #[inline(always)]
    unsafe fn load<const P: usize>(&self, run: usize, start: usize, count: usize) -> [__m512i; P] {
        let weight = &self.weight;
        let flat = run * weight.cols + start;
        if count < 32 || flat % 32 != 0 || weight.block % 32 != 0 {
            // SAFETY: as the caller promises.
            return unsafe { Any(self.source).load(run, start, count) };
        }
        // SAFETY: 32 codes from an even element on are 16 bytes inside the data; one scale covers them.
        unsafe {
            let scale = *weight.absmax.get_unchecked(flat / weight.block);
            let values = _mm512_mul_ps(_mm512_loadu_ps(weight.code.as_ptr()), _mm512_set1_ps(scale));
            let values = round(values, weight.rounding);
            let bytes = _mm_loadu_si128(weight.packed.as_ptr().add(flat / 2).cast());
            let bytes = _mm512_cvtepu8_epi32(bytes);
            // Word 2 i is the high half of byte i, word 2 i + 1 the low half. The permutation reads 5 bits; the
            // fifth is noise of the other half, and harmless because the table is there twice.
            let index = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
            split::<P>(values, values).map(|table| _mm512_permutexvar_epi16(index, table))
        }
    }
}

/// `Rounding::apply` on 16 values.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn round(values: __m512, rounding: Rounding) -> __m512 {
    match rounding {
        Rounding::None => values,
        Rounding::Bf16 => {
            // In integers, because the instruction for it would flush subnormals to zero.
            let bits = _mm512_castps_si512(values);
            let even = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
            _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(!0xffff)))
        }
        Rounding::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
    }
}

/// Any operand, element by element.
struct Any<'a>(&'a Source<'a>);

impl Runs for Any<'_> {
    #[inline(always)]
    unsafe fn load<const P: usize>(&self, run: usize, start: usize, count: usize) -> [__m512i; P] {
        let mut values = [0f32; 32];
        self.0.read(run, start, &mut values[..count]);
        // SAFETY: 32 floats are read from an array of 32.
        unsafe { split(_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))) }
    }
}

//! An operand -> panels of bf16 pairs with AVX-512: f32 is split into planes, 4-bit codes go straight to bf16.
//!
//! A step is 32 lanes by 32 depths; a register holds 32 elements. A row of a tile of `a` holds a lane (32 depths).
//! A row of a tile of `b` holds a pair of depths (16 lanes, the two depths of a lane side by side).
//! f32 = hi + mid + lo in bf16, where each is the rounded rest of the ones before: 3 x 8 bits hold all 24.

use super::drive::{LANES, Span, TILE_BYTES};
use super::source::{Elements, Side, Source};
use super::{FourBitView, Rounding};
use crate::facts::Precision;
use half::bf16;
use std::arch::x86_64::*;

/// Elements of depth in a step, lanes in a panel, and elements in a register.
pub const STEP: usize = 32;
const TILE_LANES: usize = 16;

/// Packs the panels of a span; see `drive::Kernel::pack`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn pack(source: &Source, side: Side, precision: Precision, span: Span, out: &mut [u8]) {
    let planes = source.planes(precision);
    assert_eq!(out.len(), span.panels() * span.depth.div_ceil(STEP) * planes * 2 * TILE_BYTES);
    let layout = Layout { side, along_depth: source.along_depth, span };
    // SAFETY: the caller's machine has these features; `out` has the size of the panels and is aligned to 64 bytes.
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
    /// Loads `count` elements; the elements after them are zero.
    ///
    /// # Safety
    /// Needs the features of `pack`; `count <= 32` elements from `start` on lie inside the operand.
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
        let out = out.as_mut_ptr().cast::<__m512i>();
        // SAFETY: features as above; `out` has room for the panels; lanes and depths stay inside the span.
        unsafe {
            match (self.along_depth, self.side) {
                (true, Side::A) => self.fill_lanes::<P>(runs, out),
                (false, Side::B) => self.fill_pairs::<P>(runs, out),
                _ => self.fill_transposed::<P>(runs, out),
            }
        }
    }

    /// Fills a panel lane after lane, because the hardware prefetches a few long runs best. A register is a row of a
    /// tile.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill_lanes<const P: usize>(&self, runs: &impl Runs, out: *mut __m512i) {
        for lane in 0..self.span.panels() * LANES {
            for step in 0..self.steps() {
                let (start, depth) = self.depths(step);
                let row = if lane < self.span.lanes {
                    // SAFETY: see `fill`.
                    unsafe { runs.load::<P>(self.span.lane + lane, start, depth) }
                } else {
                    [_mm512_setzero_si512(); P]
                };
                for (plane, &row) in row.iter().enumerate() {
                    let tile = lane % LANES / TILE_LANES;
                    // SAFETY: see `fill`.
                    unsafe {
                        self.row::<P>(out, lane / LANES, step, plane, tile, lane % TILE_LANES).write(row)
                    };
                }
            }
        }
    }

    /// Fills a panel in which two interleaved depths are a row of two tiles. The inner loop goes panel after panel,
    /// along memory.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill_pairs<const P: usize>(&self, runs: &impl Runs, out: *mut __m512i) {
        for step in 0..self.steps() {
            for pair in 0..STEP / 2 {
                for panel in 0..self.span.panels() {
                    // SAFETY: see `fill`.
                    let rows = unsafe { self.pair::<P>(runs, panel, step, pair) };
                    for (plane, tiles) in rows.iter().enumerate() {
                        for (tile, &row) in tiles.iter().enumerate() {
                            // SAFETY: see `fill`.
                            unsafe { self.row::<P>(out, panel, step, plane, tile, pair).write(row) };
                        }
                    }
                }
            }
        }
    }

    /// Fills the other operand's layout tile by tile, then transposes it in words of a pair of depths.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn fill_transposed<const P: usize>(&self, runs: &impl Runs, out: *mut __m512i) {
        for panel in 0..self.span.panels() {
            for step in 0..self.steps() {
                let mut tiles = [[[_mm512_setzero_si512(); TILE_LANES]; 2]; P];
                let (start, depth) = self.depths(step);
                for index in 0..if self.along_depth { LANES } else { STEP / 2 } {
                    if self.along_depth {
                        let lane = panel * LANES + index;
                        if lane >= self.span.lanes {
                            break;
                        }
                        // SAFETY: see `fill`.
                        let row = unsafe { runs.load::<P>(self.span.lane + lane, start, depth) };
                        for (tiles, row) in tiles.iter_mut().zip(row) {
                            tiles[index / TILE_LANES][index % TILE_LANES] = row;
                        }
                    } else {
                        // SAFETY: see `fill`.
                        let rows = unsafe { self.pair::<P>(runs, panel, step, index) };
                        for (tiles, rows) in tiles.iter_mut().zip(rows) {
                            (tiles[0][index], tiles[1][index]) = (rows[0], rows[1]);
                        }
                    }
                }
                for (plane, tiles) in tiles.iter().enumerate() {
                    for (tile, rows) in tiles.iter().enumerate() {
                        for (row, value) in transpose_16x16(rows).into_iter().enumerate() {
                            // SAFETY: see `fill`.
                            unsafe { self.row::<P>(out, panel, step, plane, tile, row).write(value) };
                        }
                    }
                }
            }
        }
    }

    /// Depths `2 pair` and `2 pair + 1` of a step for the 32 lanes of a panel: a row of each of its two tiles.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair<const P: usize>(
        &self,
        runs: &impl Runs,
        panel: usize,
        step: usize,
        pair: usize,
    ) -> [[__m512i; 2]; P] {
        let (start, depth) = self.depths(step);
        let part = self.span.panel(panel);
        let load = |at: usize| {
            if at < depth {
                // SAFETY: see `fill`.
                unsafe { runs.load::<P>(start + at, part.lane, part.lanes) }
            } else {
                [_mm512_setzero_si512(); P]
            }
        };
        let (even, odd) = (load(2 * pair), load(2 * pair + 1));
        let (low, high) = (interleave(0), interleave(16));
        let mut rows = [[low; 2]; P];
        for (plane, rows) in rows.iter_mut().enumerate() {
            rows[0] = _mm512_permutex2var_epi16(even[plane], low, odd[plane]);
            rows[1] = _mm512_permutex2var_epi16(even[plane], high, odd[plane]);
        }
        rows
    }

    fn steps(&self) -> usize {
        self.span.depth.div_ceil(STEP)
    }

    /// (first depth of a step, number of depths in it)
    #[inline(always)]
    fn depths(&self, step: usize) -> (usize, usize) {
        (self.span.start + step * STEP, STEP.min(self.span.depth - step * STEP))
    }

    /// Returns the destination of a row of a tile.
    #[inline(always)]
    fn row<const P: usize>(
        &self,
        out: *mut __m512i,
        panel: usize,
        step: usize,
        plane: usize,
        tile: usize,
        row: usize,
    ) -> *mut __m512i {
        out.wrapping_add((((panel * self.steps() + step) * P + plane) * 2 + tile) * 16 + row)
    }
}

/// Returns word indices that pair the elements `first..first + 16` of two registers.
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

/// Splits 32 floats into planes of bf16.
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

/// Widens 16 bf16 to floats.
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
        // SAFETY: masked elements are not touched; the others lie inside the data.
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
        // SAFETY: masked elements are not touched; the others lie inside the data.
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
        if count < 32 || !flat.is_multiple_of(32) || !weight.block.is_multiple_of(32) {
            // SAFETY: guaranteed by the caller.
            return unsafe { Any(self.source).load(run, start, count) };
        }
        // SAFETY: 32 codes from an even element on are 16 bytes inside the data; one scale covers them.
        unsafe {
            let scale = *weight.absmax.get_unchecked(flat / weight.block);
            let values = _mm512_mul_ps(_mm512_loadu_ps(weight.code.as_ptr()), _mm512_set1_ps(scale));
            let values = round(values, weight.rounding);
            let bytes = _mm_loadu_si128(weight.packed.as_ptr().add(flat / 2).cast());
            let bytes = _mm512_cvtepu8_epi32(bytes);
            // Word 2 i is the high half of byte i, word 2 i + 1 the low half. The permutation reads 5 bits. The
            // fifth belongs to the other half and does no harm, because the table holds the values twice.
            let index = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
            split::<P>(values, values).map(|table| _mm512_permutexvar_epi16(index, table))
        }
    }
}

/// Does `Rounding::apply` on 16 values.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn round(values: __m512, rounding: Rounding) -> __m512 {
    match rounding {
        Rounding::None => values,
        Rounding::Bf16 => {
            // Computed in integers, because the instruction for it would flush subnormals to zero.
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

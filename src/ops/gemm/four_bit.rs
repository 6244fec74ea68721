//! A 4-bit weight as bitsandbytes stores it -> its exact values, in the weight's own type, as f32.
//!
//! `value = round(code[nibble] * absmax[flat / block])`: one f32 product, rounded to nearest even to the type that
//! the
//! weight had before it was quantised. Elements are counted over the flat tensor, so a block may straddle rows.

use half::{bf16, f16};
use rayon::prelude::*;

/// The type that dequantised values are rounded to: the weight's own (bitsandbytes' `quant_state.dtype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Not rounded: f32.
    None,
    /// Rounded to bf16.
    Bf16,
    /// Rounded to f16.
    F16,
}

/// A weight [rows, cols]: element `2 i` is in the high half of byte `i`, and `block` elements share one scale.
#[derive(Clone, Copy)]
pub struct FourBitView<'a> {
    /// Two indices per byte.
    pub packed: &'a [u8],
    /// The scale of each block.
    pub absmax: &'a [f32],
    /// The 16 values.
    pub code: &'a [f32; 16],
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub cols: usize,
    /// Elements that share one scale, a power of two.
    pub block: usize,
    /// The type that products are rounded to.
    pub rounding: Rounding,
}

impl FourBitView<'_> {
    /// Panics unless data and scales cover the shape. The kernels rely on this check.
    pub(super) fn check(&self) {
        let count = self.rows.checked_mul(self.cols).expect("a weight's size fits usize");
        assert!(self.block >= 2 && self.block.is_power_of_two(), "block of {} elements", self.block);
        assert!(self.packed.len() >= count.div_ceil(2), "{} bytes for {count} elements", self.packed.len());
        assert!(self.absmax.len() >= count.div_ceil(self.block), "{} scales for {count}", self.absmax.len());
    }

    /// Returns the 16 values that a block can hold.
    fn table(&self, block: usize) -> [f32; 16] {
        let scale = self.absmax[block];
        self.code.map(|code| self.rounding.apply(code * scale))
    }

    /// Reads the values of the flat elements `start..start + out.len()`.
    pub(super) fn read(&self, start: usize, out: &mut [f32]) {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / self.block;
            let count = ((block + 1) * self.block - at).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            self.read_in_block(at, &self.table(block), now);
            (at, rest) = (at + count, later);
        }
    }

    fn read_in_block(&self, start: usize, table: &[f32; 16], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if start.is_multiple_of(2)
            && out.len().is_multiple_of(32)
            && std::arch::is_x86_feature_detected!("avx512f")
        {
            // SAFETY: the machine has AVX-512.
            unsafe { expand(table, &self.packed[start / 2..][..out.len() / 2], out) };
            return;
        }
        self.read_pairs(start, table, out);
    }

    fn read_pairs(&self, start: usize, table: &[f32; 16], out: &mut [f32]) {
        let high = |at: usize| table[(self.packed[at / 2] >> 4) as usize];
        let low = |at: usize| table[(self.packed[at / 2] & 15) as usize];
        let (odd, out) = out.split_at_mut(start % 2);
        if let [first] = odd {
            *first = low(start);
        }
        let start = start + odd.len();
        let mut pairs = out.chunks_exact_mut(2);
        let mut at = start;
        for (pair, &byte) in pairs.by_ref().zip(&self.packed[start / 2..]) {
            pair[0] = table[(byte >> 4) as usize];
            pair[1] = table[(byte & 15) as usize];
            at += 2;
        }
        if let [last] = pairs.into_remainder() {
            *last = high(at);
        }
    }
}

/// Computes `out[2 i]` and `out[2 i + 1]` from byte `i`, 32 values at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn expand(table: &[f32; 16], packed: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::*;
    // SAFETY: 64 bytes are read from an array of 64 bytes.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (bytes, out) in packed.chunks_exact(16).zip(out.chunks_exact_mut(32)) {
        // SAFETY: 16 bytes are read and 32 values written, each in a chunk of that length.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            // The permutation reads only the low four bits of each index.
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            let odd = _mm512_permutexvar_ps(bytes, table);
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(even, first, odd));
            _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(even, second, odd));
        }
    }
}

impl Rounding {
    pub(super) fn apply(self, value: f32) -> f32 {
        match self {
            Rounding::None => value,
            Rounding::Bf16 => bf16::from_f32(value).to_f32(),
            Rounding::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Writes all values of `view`, row-major and bit-exact, on the threads of the current rayon pool.
pub fn dequantize(view: &FourBitView, out: &mut [f32]) {
    view.check();
    assert_eq!(out.len(), view.rows * view.cols, "values of [{}, {}]", view.rows, view.cols);
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(index, out)| view.read(index * CHUNK, out));
}

/// Elements that one task expands: 256 KiB of f32, a fraction of L2.
const CHUNK: usize = 1 << 16;

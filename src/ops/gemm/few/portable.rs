//! The registers of `few` in plain Rust: eight lanes.

use half::bf16;

use super::tile::{Lanes, rounded};
use crate::facts::Precision;
use crate::ops::gemm::Rounding;

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

//! A number -> 8 bits -> a number: E4M3, a sign, four bits of exponent and three of fraction, as fp8 caches elsewhere
//! have it ("FP8 Formats for Deep Learning", Micikevicius et al. 2022).
//!
//! The finite numbers reach from 2^-9 to 448. Larger ones become 448, and a NaN stays one. `kernels/eight_bits.cuh` is
//! the twin.

use half::bf16;

use crate::ops::cpu::Real;

/// The bits of a NaN, without its sign.
const NAN: u8 = 0x7f;
/// The largest number.
pub const LARGEST: f32 = 448.0;
/// The least number with a whole fraction; those below it are multiples of 2^-9.
const NORMAL: f32 = 0.015625;

/// Returns the nearest of the numbers, of two the one with the even fraction.
pub fn narrow(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let size = x.abs();
    let bits = if size.is_nan() {
        NAN
    } else if size < NORMAL {
        (size * 512.0).round_ties_even() as u8
    } else {
        let bits = size.min(LARGEST).to_bits();
        // Half a step of the fraction that stays, less one if that is even; then the exponents differ by 120.
        (((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)) as u8
    };
    sign | bits
}

/// Returns the number of these bits. bf16 holds each of them exactly.
#[inline(always)]
pub fn widen<T: Real>(bits: u8) -> T {
    T::widen(bf16::from_bits(WIDE[bits as usize]))
}

/// The bf16 of each of the 256.
static WIDE: [u16; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        table[bits] = wide(bits as u16);
        bits += 1;
    }
    table
};

const fn wide(bits: u16) -> u16 {
    let (sign, exponent, fraction) = ((bits & 0x80) << 8, bits >> 3 & 15, bits & 7);
    sign | match (exponent, fraction) {
        (15, 7) => 0x7fc0,
        (0, 0) => 0,
        // fraction * 2^-9, which in bf16 has a leading one.
        (0, _) => {
            let leading = 15 - fraction.leading_zeros() as u16;
            (leading + 118) << 7 | ((fraction << (7 - leading)) & 0x7f)
        }
        _ => (exponent + 120) << 7 | fraction << 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the number by the definition of the format.
    fn defined(bits: u8) -> f64 {
        let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
        let size = match (exponent, bits & 7) {
            (15, 7) => f64::NAN,
            (0, _) => fraction / 8.0 * 2f64.powi(-6),
            _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
        };
        if bits & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn all_256_are_the_numbers_of_the_format_and_come_back() {
        for bits in 0..=255u8 {
            let (found, expected) = (widen::<f64>(bits), defined(bits));
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{bits:#x}: {found} {expected}"
            );
            assert_eq!(found.is_sign_negative(), bits & 0x80 != 0, "{bits:#x}");
            assert_eq!(narrow(found as f32), bits, "{found}");
        }
        assert_eq!(widen::<f32>(0x7e), LARGEST);
    }

    /// Numbers of every size and those halfway between two neighbours, against a search through all.
    #[test]
    fn the_nearest_number_is_taken_and_of_two_the_even_one() {
        let all: Vec<u8> = (0..=255).filter(|bits| bits & 0x7f != NAN).collect();
        let nearest = |x: f64| {
            let distance = |bits: u8| (defined(bits) - x).abs();
            let least = all.iter().map(|bits| distance(*bits)).fold(f64::INFINITY, f64::min);
            let near = all.iter().copied().filter(|bits| distance(*bits) == least);
            let same_sign = |bits: &u8| (bits & 0x80 != 0) == x.is_sign_negative();
            near.filter(same_sign).min_by_key(|bits| bits & 1).unwrap()
        };
        let mut tried = Vec::new();
        for pair in all.windows(2).filter(|pair| pair[0] & 0x80 == pair[1] & 0x80) {
            let (a, b) = (defined(pair[0]), defined(pair[1]));
            tried.extend([0.25, 0.5, 0.75].map(|part| (a + (b - a) * part) as f32));
        }
        let mut x = 1e-6f32;
        while x < 2000.0 {
            tried.extend([x, -x]);
            x *= 1.0137;
        }
        for x in tried {
            assert_eq!(narrow(x), nearest(f64::from(x)), "{x}");
        }
        assert_eq!([0.0, -0.0, 1e-9, f32::INFINITY, -1e30].map(narrow), [0, 0x80, 0, 0x7e, 0xfe]);
        assert!(widen::<f32>(narrow(f32::NAN)).is_nan());
    }
}

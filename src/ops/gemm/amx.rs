//! bf16 panels -> blocks of `c` with AMX tiles, for f32 too: a product of split operands is a sum of bf16 products.
//!
//! A 32x32 block lives in four tiles; a step loads two tiles of `a` and two of `b` for four products. f32 needs six
//! products of planes (three with an operand that is bf16 already), small ones first. What is left out, mid * lo and
//! smaller, is below 2^-23 of a product, the error f32 itself makes. Intel's tiles do 16 times the rate of its f32
//! units, so this is still faster than f32.

use super::drive::{Kernel, Multiply, TILE_BYTES};
use super::{avx512, pack_bf16};
use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T1, _mm_prefetch};
use std::sync::OnceLock;

pub static KERNEL: Kernel = Kernel {
    name: "amx",
    step: pack_bf16::STEP,
    split: true,
    pack: pack_bf16::pack,
    begin,
    end,
    multiply,
    store: avx512::store,
};

/// Whether tiles exist and the kernel lets this process use them. Asks once.
pub fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| avx512::has_bf16() && has_tiles() && ask())
}

/// CPUID leaf 7: AMX-BF16 and AMX-TILE.
fn has_tiles() -> bool {
    let tiles = 1 << 22 | 1 << 24;
    std::arch::x86_64::__get_cpuid_max(0).0 >= 7
        && std::arch::x86_64::__cpuid_count(7, 0).edx & tiles == tiles
}

/// Linux enables the 8 KiB of tile state for processes that ask; threads started later inherit it.
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory; an old Linux answers with an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows by 64 bytes.
static CONFIG: Config = {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        config.row_bytes[tile] = 64;
        config.rows[tile] = 16;
        tile += 1;
    }
    config
};

unsafe fn begin() {
    // SAFETY: the caller has tiles; the configuration is 64 valid bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags)) }
}

unsafe fn end() {
    // SAFETY: the caller has tiles; nothing of theirs is needed any more.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
}

unsafe fn multiply(job: Multiply) {
    // SAFETY: as the caller promises.
    unsafe {
        match (job.a_planes, job.b_planes) {
            (1, 1) => planes::<1, 1>(job),
            (1, 2) => planes::<1, 2>(job),
            (1, 3) => planes::<1, 3>(job),
            (2, 1) => planes::<2, 1>(job),
            (2, 2) => planes::<2, 2>(job),
            (2, 3) => planes::<2, 3>(job),
            (3, 1) => planes::<3, 1>(job),
            (3, 2) => planes::<3, 2>(job),
            (3, 3) => planes::<3, 3>(job),
            (a, b) => unreachable!("{a} x {b} planes"),
        }
    }
}

macro_rules! load {
    ($tile:literal, $from:expr) => {
        asm!(concat!("tileloadd ", $tile, ", [{from} + {stride}]"), from = in(reg) $from, stride = in(reg) 64usize,
            options(nostack, readonly, preserves_flags))
    };
}

macro_rules! product {
    ($sum:literal, $a:literal, $b:literal) => {
        asm!(concat!("tdpbf16ps ", $sum, ", ", $a, ", ", $b), options(nostack, nomem, preserves_flags))
    };
}

macro_rules! store {
    ($tile:literal, $to:expr) => {
        asm!(concat!("tilestored [{to} + {stride}], ", $tile), to = in(reg) $to, stride = in(reg) 64usize,
            options(nostack, preserves_flags))
    };
}

/// tmm0..3 are the sums, tmm4 and 5 tiles of `a`, tmm6 and 7 tiles of `b`. Rust itself never uses them.
unsafe fn planes<const A: usize, const B: usize>(job: Multiply) {
    let sums = job.sums.cast::<u8>();
    let (two_rows, two_cols) = (job.rows > 16, job.cols > 16);
    // SAFETY: the sums are four tiles; each panel holds `steps` steps of two tiles for each plane.
    unsafe {
        if job.add {
            load!("tmm0", sums);
            load!("tmm1", sums.add(TILE_BYTES));
            load!("tmm2", sums.add(2 * TILE_BYTES));
            load!("tmm3", sums.add(3 * TILE_BYTES));
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        let (mut a, mut b) = (job.a, job.b);
        let c_rows = job.soon.c_rows.div_ceil(job.steps.max(1));
        for step in 0..job.steps {
            for row in step * c_rows..((step + 1) * c_rows).min(job.soon.c_rows) {
                let at = job.soon.c.wrapping_add(row * job.soon.c_row_stride).cast::<i8>();
                _mm_prefetch::<_MM_HINT_ET0>(at);
                _mm_prefetch::<_MM_HINT_ET0>(at.wrapping_add(64));
            }
            for line in 0..job.soon.panel_lines {
                let line = step * job.soon.panel_lines + line;
                _mm_prefetch::<_MM_HINT_T1>(job.soon.panel.wrapping_add(line * 64).cast::<i8>());
            }
            let (mut a_now, mut b_now) = (usize::MAX, usize::MAX);
            macro_rules! term {
                ($a:literal, $b:literal) => {
                    if $a < A && $b < B {
                        if b_now != $b {
                            load!("tmm6", b.add($b * 2 * TILE_BYTES));
                        }
                        if a_now != $a {
                            load!("tmm4", a.add($a * 2 * TILE_BYTES));
                        }
                        product!("tmm0", "tmm4", "tmm6");
                        if two_cols {
                            if b_now != $b {
                                load!("tmm7", b.add($b * 2 * TILE_BYTES + TILE_BYTES));
                            }
                            product!("tmm1", "tmm4", "tmm7");
                        }
                        if two_rows {
                            if a_now != $a {
                                load!("tmm5", a.add($a * 2 * TILE_BYTES + TILE_BYTES));
                            }
                            product!("tmm2", "tmm5", "tmm6");
                            if two_cols {
                                product!("tmm3", "tmm5", "tmm7");
                            }
                        }
                        (a_now, b_now) = ($a, $b);
                    }
                };
            }
            // Each term shares a plane with the one before, except where planes are missing.
            term!(0, 2);
            term!(0, 1);
            term!(1, 1);
            term!(1, 0);
            term!(2, 0);
            term!(0, 0);
            let _ = (a_now, b_now);
            a = a.add(A * 2 * TILE_BYTES);
            b = b.add(B * 2 * TILE_BYTES);
        }
        store!("tmm0", sums);
        store!("tmm1", sums.add(TILE_BYTES));
        store!("tmm2", sums.add(2 * TILE_BYTES));
        store!("tmm3", sums.add(3 * TILE_BYTES));
    }
}

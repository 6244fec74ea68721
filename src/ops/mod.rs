//! Operations: each one a formula, its gradient, a fast CPU path; kernels share the stem.
//!
//! Never candle_nn's fused layers here: they drop gradients silently, and hone's backward passes are its own.

pub mod gemm;
pub mod cpu;
pub mod adamw;
pub mod attention;
pub mod bias;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod four_bit;
pub mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod swiglu;

#[cfg(test)]
pub mod judge;

//! Operations: each one a formula, its gradient, a fast CPU path; kernels share the stem.

pub mod gemm;

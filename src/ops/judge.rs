//! What tests judge operations by: candle's autograd of the formula, and finite differences, both in f64.

use candle_core::{Device, Result, Shape, Tensor, Var};

/// A variable filled from a fixed seed with values of about unit size.
pub fn random(shape: impl Into<Shape>, seed: u64) -> Result<Var> {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f64) / (1u64 << 31) as f64 - 0.5
    };
    let values: Vec<f64> =
        (0..shape.elem_count()).map(|_| (uniform() + uniform() + uniform()) * 2.0).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Largest difference, relative to the larger of 1 and the expected size.
pub fn same(found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (super::cpu::to_f64(found)?, super::cpu::to_f64(expected)?);
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (found - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "element {i}: found {found}, expected {expected}");
    }
    Ok(())
}

/// Gradient of `x` when `dy` flows into `y`, by candle's autograd.
pub fn gradient(x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let store = (y * dy)?.sum_all()?.backward()?;
    Ok(store.get(x).expect("y depends on x").clone())
}

/// Compares `dx` with central differences of `sum(f(x) * dy)` at every element.
pub fn finite_differences(
    x: &Tensor,
    dy: &Tensor,
    dx: &Tensor,
    tolerance: f64,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    const STEP: f64 = 1e-5;
    let (values, found) = (super::cpu::to_f64(x)?, super::cpu::to_f64(dx)?);
    let at = |i: usize, step: f64| -> Result<f64> {
        let mut moved = values.clone();
        moved[i] += step;
        let moved = Tensor::from_vec(moved, x.shape(), &Device::Cpu)?;
        (f(&moved)? * dy)?.sum_all()?.to_scalar::<f64>()
    };
    for (i, found) in found.iter().enumerate() {
        let expected = (at(i, STEP)? - at(i, -STEP)?) / (2.0 * STEP);
        let error = (found - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "element {i}: found {found}, finite difference {expected}");
    }
    Ok(())
}

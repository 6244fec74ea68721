//! Judges of operations in tests: candle's autograd of the formula, and finite differences, both in f64.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

/// Returns a variable with values of about unit size from a fixed seed.
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

/// Asserts that all elements agree within `tolerance`, relative to the larger of 1 and the expected size.
pub fn same(found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (super::cpu::to_f64(found)?, super::cpu::to_f64(expected)?);
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (found - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "element {i}: found {found}, expected {expected}");
    }
    Ok(())
}

/// Returns the gradient of `x` if the gradient of `y` is `dy`, by candle's autograd.
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

/// Returns the first `width` columns of a matrix, on the CPU.
pub fn first(matrix: &Tensor, width: usize) -> Result<Tensor> {
    matrix.to_device(&Device::Cpu)?.narrow(1, 0, width)?.force_contiguous()
}

/// A GPU with one of its kernels' storage types.
pub struct Gpu {
    /// The GPU.
    pub device: Device,
    /// The kernels' storage type.
    pub dtype: DType,
    /// Largest error, relative to the norm of the expected values.
    tolerance: f64,
}

/// Runs `body` on the GPU in f32 and in bf16. A machine without a GPU is no failure unless `HONE_TEST_GPU=require`
/// (`tests/gpu` sets it, with a driver that has no GPU behind it).
pub fn on_gpu(body: impl Fn(&Gpu) -> Result<()>) -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 8e-3)] {
        body(&Gpu { device: device.clone(), dtype, tolerance })?;
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Option<Device> {
    None
}

/// Returns the GPU of the tests. `None`: there is none, and the environment does not require one.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<Device> {
    static DEVICE: std::sync::OnceLock<Option<Device>> = std::sync::OnceLock::new();
    let required = std::env::var("HONE_TEST_GPU").is_ok_and(|value| value == "require");
    let open = || match super::cuda::device::open(0) {
        Ok(device) => Some(device),
        Err(fault) if required => panic!("HONE_TEST_GPU=require, but {fault}"),
        Err(_) => None,
    };
    DEVICE.get_or_init(open).clone()
}

impl Gpu {
    /// Does `random` with values that the storage type holds exactly, so that the formula in f64 sees the kernel's
    /// values.
    pub fn random(&self, shape: impl Into<Shape>, seed: u64) -> Result<Var> {
        Var::from_tensor(&random(shape, seed)?.to_dtype(self.dtype)?.to_dtype(DType::F64)?.detach())
    }

    /// Copies a tensor to the GPU in the storage type.
    pub fn put(&self, tensor: &Tensor) -> Result<Tensor> {
        self.put_as(self.dtype, tensor)
    }

    /// Copies a tensor to the GPU in the given type.
    pub fn put_as(&self, dtype: DType, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_dtype(dtype)?.contiguous()?.to_device(&self.device)
    }

    /// Compares with the result of f64 arithmetic on the same inputs.
    pub fn same(&self, found: &Tensor, expected: &Tensor) -> Result<()> {
        self.within(self.tolerance, found, expected)
    }

    /// Does `same` with another tolerance, for an operation that rounds more than once.
    pub fn within(&self, tolerance: f64, found: &Tensor, expected: &Tensor) -> Result<()> {
        assert_eq!(found.dims(), expected.dims());
        let found = super::cpu::to_f64(&found.to_device(&Device::Cpu)?)?;
        let expected = super::cpu::to_f64(expected)?;
        let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let difference: Vec<f64> =
            found.iter().zip(&expected).map(|(found, expected)| found - expected).collect();
        let error = norm(&difference) / norm(&expected).max(f64::MIN_POSITIVE);
        assert!(error <= tolerance, "{:?}: relative error {error:.2e}, at most {tolerance:.0e}", self.dtype);
        Ok(())
    }
}

//! A number that an operation computed. On a CPU it is a value; on a GPU it stays on the device until it is read.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, Real};
use crate::with_real;

/// Elements per task. Sums are taken per chunk and then over chunks, so the result does not depend on the threads.
const CHUNK: usize = 16_384;

/// One number: f64 on the host, or one element (f32 or f64) on a device.
#[derive(Clone, Debug)]
pub enum Number {
    /// A value on the host.
    Here(f64),
    /// A tensor of one element on a device.
    There(Tensor),
}

impl Number {
    /// Returns the value. Waits for the device if the number lies there.
    pub fn value(&self) -> Result<f64> {
        match self {
            Number::Here(value) => Ok(*value),
            Number::There(tensor) => Ok(cpu::to_f64(&tensor.to_device(&candle_core::Device::Cpu)?)?[0]),
        }
    }

    /// Returns the sum of two numbers on the same device, in f64 there. Does not wait for the device.
    pub fn add(&self, other: &Number) -> Result<Number> {
        match (self, other) {
            (Number::Here(one), Number::Here(other)) => Ok(Number::Here(one + other)),
            #[cfg(feature = "cuda")]
            (Number::There(one), Number::There(other)) => gpu::sum(&[one, other]),
            _ => bail!("numbers of two devices cannot be added"),
        }
    }

    /// Writes the number into `to` as two values: the number rounded to the type of `to`, and the rest. In f32 that
    /// keeps 48 bits. The rest of a number that is not finite is 0.
    pub fn split(&self, to: &Tensor) -> Result<()> {
        if to.elem_count() != 2 {
            bail!("a number is split into two values, not {}", to.elem_count());
        }
        #[cfg(feature = "cuda")]
        if let (Number::There(number), true) = (self, to.device().is_cuda()) {
            return gpu::split(number, to);
        }
        let number = self.value()?;
        with_real!(to, T => cpu::edit(to, |to: &mut [T]| {
            let rest = number - T::of(number).wide();
            (to[0], to[1]) = (T::of(number), T::of(if rest.is_finite() { rest } else { 0.0 }));
        }))
    }

    /// Returns the sum of all elements, in f64.
    pub fn total(x: &Tensor) -> Result<Number> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return gpu::sum(&[x]);
        }
        with_real!(x, T => Ok(Number::Here(cpu::read::<T>(x)?.iter().map(|x| x.wide()).sum())))
    }

    /// Returns the sum of the squares of all elements, in f64.
    pub fn squares(x: &Tensor) -> Result<Number> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return gpu::squares(x);
        }
        with_real!(x, T => {
            let x = &*cpu::read::<T>(x)?;
            let sum = |chunk: &[T]| chunk.iter().map(|x| x.wide() * x.wide()).sum::<f64>();
            Ok(Number::Here(x.par_chunks(CHUNK).map(sum).collect::<Vec<f64>>().into_iter().sum()))
        })
    }
}

/// Numbers of one device that are being copied to the host, in the order in which they were sent.
pub struct Numbers(Way);

enum Way {
    Arrived(Vec<f64>),
    /// Copies under way, and in the place of each its value if the host had it already.
    #[cfg(feature = "cuda")]
    Sent(super::cuda::late::Late, Vec<Option<f64>>),
}

impl Numbers {
    /// Starts the copy, which happens as soon as the device has computed the numbers. Does not wait.
    pub fn send(numbers: &[Number]) -> Result<Numbers> {
        let here = |number: &Number| match number {
            Number::Here(value) => Some(*value),
            Number::There(_) => None,
        };
        if let Some(values) = numbers.iter().map(here).collect::<Option<Vec<f64>>>() {
            return Ok(Numbers(Way::Arrived(values)));
        }
        send_from_device(numbers)
    }

    /// Returns whether `values` returns at once.
    pub fn are_here(&self) -> bool {
        matches!(self.0, Way::Arrived(_))
    }

    /// Waits for the numbers and returns them.
    pub fn values(self) -> Result<Vec<f64>> {
        match self.0 {
            Way::Arrived(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Way::Sent(late, known) => {
                let mut late = late.values()?.into_iter();
                let value = |known: Option<f64>| known.or_else(|| late.next());
                Ok(known.into_iter().map(value).map(|value| value.expect("one copy for each")).collect())
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn send_from_device(numbers: &[Number]) -> Result<Numbers> {
    let (mut known, mut tensors) = (Vec::with_capacity(numbers.len()), Vec::new());
    for number in numbers {
        match number {
            Number::Here(value) => known.push(Some(*value)),
            Number::There(tensor) => {
                known.push(None);
                tensors.push(tensor.clone());
            }
        }
    }
    Ok(Numbers(Way::Sent(super::cuda::late::Late::send(tensors)?, known)))
}

#[cfg(not(feature = "cuda"))]
fn send_from_device(numbers: &[Number]) -> Result<Numbers> {
    Ok(Numbers(Way::Arrived(numbers.iter().map(Number::value).collect::<Result<_>>()?)))
}

/// The launches of `kernels/number.cu`.
#[cfg(feature = "cuda")]
pub(super) mod gpu {
    use super::*;
    use crate::ops::cuda::{self, Launch};
    use candle_core::DType;

    /// Values that one thread block squares and adds.
    const SHARE: usize = 16_384;

    /// Returns the sum of squares of an f32 tensor; it stays on the GPU.
    pub fn squares(x: &Tensor) -> Result<Number> {
        let blocks = x.elem_count().div_ceil(SHARE);
        let parts = crate::ops::unwritten(blocks, DType::F64, x.device())?;
        let launch = Launch::untyped(cuda::device(x)?, "number", "squares").of(DType::F32, x);
        let launch = launch.of(DType::F64, &parts).long(x.elem_count() as u64).int(SHARE);
        launch.launch((blocks, 1, 1), 256, 0)?;
        sum(&[&parts])
    }

    /// Writes a number (f32 or f64) into two f32 values.
    pub fn split(number: &Tensor, to: &Tensor) -> Result<()> {
        let name = match number.dtype() {
            DType::F32 => "split_f32",
            _ => "split_f64",
        };
        let launch = Launch::untyped(cuda::device(to)?, "number", name).of(number.dtype(), number);
        launch.of(DType::F32, to).launch((1, 1, 1), 1, 0)
    }

    /// Returns the sum of all elements of tensors (f32 or f64) on one device. One block adds one tensor after the
    /// other.
    pub fn sum(list: &[&Tensor]) -> Result<Number> {
        let Some(first) = list.first() else { bail!("a sum of no tensors has no device") };
        let total = Tensor::zeros(1, DType::F64, first.device())?;
        for x in list {
            let name = match x.dtype() {
                DType::F32 => "total_f32",
                _ => "total_f64",
            };
            let launch = Launch::untyped(cuda::device(x)?, "number", name).of(x.dtype(), x);
            launch.int(x.elem_count()).of(DType::F64, &total).launch((1, 1, 1), 1024, 0)?;
        }
        Ok(Number::There(total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;
    use candle_core::DType;

    #[test]
    fn numbers_arrive_in_their_order() -> Result<()> {
        let here = Numbers::send(&[Number::Here(1.5), Number::Here(-2.0)])?;
        assert!(here.are_here());
        assert_eq!(here.values()?, [1.5, -2.0]);
        judge::on_gpu(|gpu| {
            let there = |value: f64, dtype| {
                Tensor::new(&[value], &candle_core::Device::Cpu)?.to_dtype(dtype)?.to_device(&gpu.device)
            };
            let list = [
                Number::There(there(0.25, DType::F32)?),
                Number::Here(3.0),
                Number::There(there(1e-9, DType::F64)?),
            ];
            let sent = Numbers::send(&list)?;
            assert!(!sent.are_here());
            assert_eq!(sent.values()?, [0.25, 3.0, 1e-9]);
            assert_eq!(list[0].value()?, 0.25);
            Ok(())
        })
    }

    #[test]
    fn squares_and_sums_are_exact_on_both_sides() -> Result<()> {
        assert_eq!(Number::Here(1.5).add(&Number::Here(2.0))?.value()?, 3.5);
        judge::on_gpu(|gpu| {
            for count in [1, 3, 4, 1023, 16_384, 50_001] {
                let x = judge::random(count, count as u64)?.to_dtype(DType::F32)?.detach();
                let expected = Number::squares(&x)?.value()?;
                let found = Number::squares(&x.to_device(&gpu.device)?)?;
                assert!((found.value()? - expected).abs() <= 1e-13 * expected, "{count} values");
                let twice = found.add(&Number::squares(&x.to_device(&gpu.device)?)?)?;
                assert!((twice.value()? - 2.0 * expected).abs() <= 1e-13 * expected);
            }
            let lies_at = |device: &candle_core::Device| -> Result<()> {
                for value in [0.0, -3.25, 0.1, 1e30, 123_456_789.123_456_78] {
                    let number = match device.is_cpu() {
                        true => Number::Here(value),
                        false => Number::There(Tensor::new(&[value], device)?),
                    };
                    let pair = Tensor::zeros(8, DType::F32, device)?;
                    number.split(&pair.narrow(0, 4, 2)?)?;
                    let total = Number::total(&pair)?.value()?;
                    assert!((total - value).abs() <= 1e-14 * value.abs(), "{total}, not {value}");
                    let parts = pair.to_device(&candle_core::Device::Cpu)?.to_vec1::<f32>()?;
                    assert_eq!((parts[3], parts[4], parts[6]), (0.0, value as f32, 0.0));
                }
                let pair = Tensor::zeros(2, DType::F32, device)?;
                Number::There(Tensor::new(&[f32::INFINITY], device)?).split(&pair)?;
                assert_eq!(Number::total(&pair)?.value()?, f64::INFINITY);
                Ok(())
            };
            lies_at(&candle_core::Device::Cpu)?;
            lies_at(&gpu.device)?;
            let bad = Tensor::new(&[1f32, f32::NAN, 2.0], &gpu.device)?;
            assert!(Number::squares(&bad)?.value()?.is_nan());
            assert!(Number::Here(1.0).add(&Number::squares(&bad)?).is_err());
            Ok(())
        })
    }
}

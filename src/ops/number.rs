//! A number that an operation made: on a CPU it is here, on a GPU it stays there until somebody wants it.

use candle_core::{DType, Result, Tensor};

use super::cpu;

/// One number, f64 on the host or one element, f32 or f64, on a device.
#[derive(Clone, Debug)]
pub enum Number {
    Here(f64),
    There(Tensor),
}

impl Number {
    /// Waits for the device where it must.
    pub fn value(&self) -> Result<f64> {
        match self {
            Number::Here(value) => Ok(*value),
            Number::There(tensor) => Ok(cpu::to_f64(&tensor.to_device(&candle_core::Device::Cpu)?)?[0]),
        }
    }
}

/// Numbers of one device on their way to the host, in the order in which they were sent.
pub struct Numbers(Way);

enum Way {
    Arrived(Vec<f64>),
    #[cfg(feature = "cuda")]
    Sent(super::cuda::late::Late),
}

impl Numbers {
    /// Sends them as soon as the device has made them; nobody waits here.
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

    /// Whether asking for them takes no time.
    pub fn are_here(&self) -> bool {
        matches!(self.0, Way::Arrived(_))
    }

    /// Waits until they are here.
    pub fn values(self) -> Result<Vec<f64>> {
        match self.0 {
            Way::Arrived(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Way::Sent(late) => late.values(),
        }
    }
}

#[cfg(feature = "cuda")]
fn send_from_device(numbers: &[Number]) -> Result<Numbers> {
    Ok(Numbers(Way::Sent(super::cuda::late::Late::send(numbers)?)))
}

#[cfg(not(feature = "cuda"))]
fn send_from_device(numbers: &[Number]) -> Result<Numbers> {
    Ok(Numbers(Way::Arrived(numbers.iter().map(Number::value).collect::<Result<_>>()?)))
}

/// A one-element tensor's type that a `Number` may have.
pub fn is_number(tensor: &Tensor) -> bool {
    tensor.elem_count() == 1 && matches!(tensor.dtype(), DType::F32 | DType::F64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

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
}

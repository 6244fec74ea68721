//! Tensors that wait in host memory -> the same tensors on their device again. On a GPU the copies run beside the
//! computation, to and from page-locked memory that stays for later passes.
//!
//! A tensor is copied while the work that reads it runs, and is freed behind that. On the way back it is requested one
//! piece of work ahead (`expect`), so that it has arrived when it is needed.

#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::change::Change;

/// Host memory for the tensors of one pass at a time.
#[derive(Default)]
pub struct Stash {
    #[cfg(feature = "cuda")]
    beside: Mutex<Option<gpu::Beside>>,
}

/// The stash in use by a pass.
pub struct Open<'a> {
    device: Device,
    /// Tensors by their number, if they are not copied beside the computation.
    there: Vec<Option<Tensor>>,
    #[cfg(feature = "cuda")]
    beside: Option<gpu::Use<'a>>,
    _stash: std::marker::PhantomData<&'a Stash>,
}

impl Stash {
    /// Opens it for a pass with tensors of the numbers 0 to `numbers` - 1 on `device`. Another pass waits until this
    /// one is done.
    pub fn open(&self, numbers: usize, device: &Device) -> Result<Open<'_>> {
        Ok(Open {
            device: device.clone(),
            there: vec![None; numbers],
            #[cfg(feature = "cuda")]
            beside: match device {
                Device::Cuda(device) if Change::Beside.is_on() => {
                    let stash = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
                    Some(gpu::Use::new(stash, numbers, device))
                }
                _ => None,
            },
            _stash: std::marker::PhantomData,
        })
    }
}

impl Open<'_> {
    /// Begins to copy x to the host. Work that only reads it may be queued until `left`.
    pub fn leave(&mut self, number: usize, x: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(beside) = &mut self.beside {
            return beside.leave(number, x);
        }
        self.there[number] = Some(x.to_device(&Device::Cpu)?);
        Ok(())
    }

    /// Moves a tensor to the host for all work that is queued from here on, and frees its memory on the device.
    pub fn left(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(beside) = &mut self.beside {
            return beside.left();
        }
        Ok(())
    }

    /// Begins to copy a tensor back.
    pub fn expect(&mut self, number: usize) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(beside) = &mut self.beside {
            return beside.expect(number);
        }
        match self.there.get(number) {
            Some(Some(_)) => Ok(()),
            _ => bail!("tensor {number} is not in host memory"),
        }
    }

    /// Returns a tensor that is on its device again for all work that is queued from here on.
    pub fn bring(&mut self, number: usize) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(beside) = &mut self.beside {
            return beside.bring(number);
        }
        match self.there.get_mut(number).and_then(Option::take) {
            Some(x) => x.to_device(&self.device),
            None => bail!("tensor {number} is not in host memory"),
        }
    }
}

/// Copies on a second stream.
#[cfg(feature = "cuda")]
mod gpu {
    use std::sync::MutexGuard;

    use candle_core::{CudaDevice, DType, Shape};

    use super::*;
    use crate::ops::cuda::pinned::Pinned;
    use crate::ops::cuda::side::Side;
    use crate::ops::unwritten;

    /// The stream, and the memory of each number.
    pub struct Beside {
        // Dropped first: it waits for copies to and from the memory.
        side: Side,
        slots: Vec<Option<Slot>>,
    }

    struct Slot {
        memory: Pinned,
        /// The input that lies there; `None`: none of this pass.
        holds: Option<(Shape, DType)>,
    }

    /// `Beside` in a pass.
    pub struct Use<'a> {
        stash: MutexGuard<'a, Option<Beside>>,
        numbers: usize,
        device: CudaDevice,
        /// The tensor whose copy to the host has begun.
        leaving: Option<(usize, Tensor)>,
        /// The tensor whose copy from the host has begun.
        coming: Option<(usize, Tensor)>,
    }

    impl<'a> Use<'a> {
        pub fn new(
            mut stash: MutexGuard<'a, Option<Beside>>,
            numbers: usize,
            device: &CudaDevice,
        ) -> Use<'a> {
            let slots = stash.iter_mut().flat_map(|stash| &mut stash.slots).flatten();
            slots.for_each(|slot| slot.holds = None);
            Use { stash, numbers, device: device.clone(), leaving: None, coming: None }
        }

        /// Returns the stream and the memory, made when they are first needed.
        fn beside(&mut self) -> Result<&mut Beside> {
            if self.stash.as_ref().is_none_or(|stash| stash.slots.len() < self.numbers) {
                *self.stash = None;
                let slots = (0..self.numbers).map(|_| None).collect();
                *self.stash = Some(Beside { side: Side::new(&self.device, self.numbers)?, slots });
            }
            Ok(self.stash.as_mut().expect("it was just made"))
        }

        pub fn leave(&mut self, number: usize, x: &Tensor) -> Result<()> {
            assert!(self.leaving.is_none(), "one tensor leaves at a time");
            let (bytes, device) = (x.elem_count() * x.dtype().size_in_bytes(), self.device.clone());
            let beside = self.beside()?;
            if beside.slots[number].as_ref().is_none_or(|slot| slot.memory.bytes() < bytes) {
                // Copies of earlier passes may still use the memory.
                beside.side.synchronize()?;
                beside.slots[number] = None;
                beside.slots[number] = Some(Slot { memory: Pinned::on(&device, bytes)?, holds: None });
            }
            let slot = beside.slots[number].as_mut().expect("it was just made");
            beside.side.take(number, x, &slot.memory)?;
            slot.holds = Some((x.shape().clone(), x.dtype()));
            self.leaving = Some((number, x.clone()));
            Ok(())
        }

        pub fn left(&mut self) -> Result<()> {
            let Some((number, x)) = self.leaving.take() else { return Ok(()) };
            let waited = self.beside()?.side.wait_taken(number);
            drop(x);
            waited
        }

        pub fn expect(&mut self, number: usize) -> Result<()> {
            if self.coming.as_ref().is_some_and(|(coming, _)| *coming == number) {
                return Ok(());
            }
            self.settle()?;
            let device = Device::Cuda(self.device.clone());
            let Beside { side, slots } = self.beside()?;
            let slot = slots.get(number).and_then(Option::as_ref);
            let Some((slot, (shape, dtype))) = slot.and_then(|slot| Some((slot, slot.holds.as_ref()?)))
            else {
                bail!("tensor {number} is not in host memory");
            };
            let x = unwritten(shape.clone(), *dtype, &device)?;
            side.fill(number, &x, &slot.memory, x.elem_count() * dtype.size_in_bytes())?;
            self.coming = Some((number, x));
            Ok(())
        }

        pub fn bring(&mut self, number: usize) -> Result<Tensor> {
            self.expect(number)?;
            let (_, x) = self.coming.take().expect("it is on its way");
            self.beside()?.side.wait(number)?;
            Ok(x)
        }

        /// Waits for copies on their way before their memory is freed.
        fn settle(&mut self) -> Result<()> {
            self.left()?;
            match self.coming.take() {
                Some((number, _x)) => self.beside()?.side.wait(number),
                None => Ok(()),
            }
        }
    }

    impl Drop for Use<'_> {
        /// Waits for tensors that a failed pass left on their way.
        fn drop(&mut self) {
            let _ = self.settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "cuda")]
    use crate::ops::judge;

    fn tensor(number: usize, rows: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * 8).map(|i| (i * 31 + number) as f32).collect();
        Tensor::from_vec(values, (rows, 8), &Device::Cpu).unwrap()
    }

    /// Moves three tensors to the host and back, in passes of different sizes. Returns the tensors that came back too:
    /// a test may leave out the event that their memory waits for, and must then drop them after the stash, which waits
    /// for all copies.
    fn go_and_come(stash: &Stash, device: &Device) -> Result<(bool, Vec<Tensor>)> {
        let (mut same, mut stay) = (true, Vec::new());
        for rows in [4, 9, 2] {
            let mut open = stash.open(3, device)?;
            for number in 0..3 {
                let x = tensor(number, rows).to_device(device)?;
                open.leave(number, &x)?;
                drop(x);
                open.left()?;
            }
            for number in (0..3).rev() {
                let x = open.bring(number)?;
                if number > 0 {
                    open.expect(number - 1)?;
                }
                same &= x.copy()?.to_device(&Device::Cpu)?.to_vec2::<f32>()?
                    == tensor(number, rows).to_vec2::<f32>()?;
                stay.push(x);
            }
            let again = open.bring(3);
            assert!(again.is_err(), "it was never there");
        }
        Ok((same, stay))
    }

    #[test]
    fn tensors_come_back_as_they_were() -> Result<()> {
        assert!(go_and_come(&Stash::default(), &Device::Cpu)?.0);
        Ok(())
    }

    /// Copies arrive late on the fake driver: without any one of the events, other values come back.
    #[cfg(feature = "cuda")]
    #[test]
    fn tensors_come_back_to_a_gpu_and_each_event_is_needed() -> Result<()> {
        use crate::ops::cuda::side::{OMITTED, Omitted};
        let Some(device) = judge::gpu() else { return Ok(()) };
        assert!(go_and_come(&Stash::default(), &device)?.0);
        for event in [Omitted::Free, Omitted::Filled, Omitted::Taken] {
            let stash = Stash::default();
            OMITTED.set(Some(event));
            let went = go_and_come(&stash, &device);
            OMITTED.set(None);
            drop(stash);
            assert!(!went?.0, "without {event:?}");
        }
        Ok(())
    }

    /// A pass that ends in the middle leaves nothing behind.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_pass_may_end_in_the_middle() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        let stash = Stash::default();
        let mut open = stash.open(2, &device)?;
        open.leave(0, &tensor(0, 4).to_device(&device)?)?;
        drop(open);
        let mut open = stash.open(2, &device)?;
        assert!(open.bring(0).is_err(), "it is of another pass");
        open.leave(0, &tensor(1, 4).to_device(&device)?)?;
        open.left()?;
        open.expect(0)?;
        drop(open);
        assert!(go_and_come(&stash, &device)?.0);
        Ok(())
    }
}

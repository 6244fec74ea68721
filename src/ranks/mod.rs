//! Processes that train together -> sums, bytes and an order of ranks that all of them share.
//!
//! One process drives one device and is one rank. All ranks compute the same plan from the same seeds, and make the
//! same calls of a `Collective` in the same order. A rank that fails or is silent makes every later call an error.

pub mod follower;
mod frame;
pub mod launch;
pub mod link;
mod meet;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod place;
pub mod threads;

use candle_core::{DType, Tensor};

use crate::fault::{Fault, Result};

/// The place of a process among those that train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of this process, from 0. Rank 0 owns the run folder.
    pub rank: usize,
    /// Number of all processes.
    pub world: usize,
    /// Number of this process among those of its machine, from 0. It chooses the device.
    pub local_rank: usize,
    /// Number of the processes of this machine.
    pub local_world: usize,
}

impl Place {
    /// The place of a process that trains by itself.
    pub const ALONE: Place = Place { rank: 0, world: 1, local_rank: 0, local_world: 1 };

    /// Returns whether this process writes checkpoints, metrics and the adapter.
    pub fn leads(self) -> bool {
        self.rank == 0
    }
}

/// The calls that the ranks of a run make together. Every rank makes the same calls in the same order; a rank that
/// fails or is silent makes every call an error.
pub trait Collective: Send + Sync {
    /// Returns the place of this process.
    fn place(&self) -> Place;

    /// Sums a flat f32 tensor over all ranks, in place, on its device. The result has the same bits on every rank.
    fn sum(&self, flat: &Tensor) -> Result<()>;

    /// Begins a sum as `sum` makes it, behind all work that the device's stream has queued so far. It may run beside
    /// later work, which leaves `flat` alone until `summed`. Sums end in the order in which they began.
    fn begin_sum(&self, flat: &Tensor) -> Result<()> {
        self.sum(flat)
    }

    /// Completes the sums that were begun, for all work queued from here on. A device's host does not wait for them.
    fn summed(&self) -> Result<()> {
        Ok(())
    }

    /// Writes every rank's `piece` into `whole`, by rank. Both are u8 tensors on one device (a sharded base). It begins
    /// when all work is done that the device's stream has queued so far, since that work may read `whole`. It may run
    /// beside later work, which reads `whole` only behind `arrived`.
    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()>;

    /// Makes the device's stream wait for the last `gather_into`. The host does not wait.
    fn arrived(&self) -> Result<()> {
        Ok(())
    }

    /// Returns every rank's bytes, by rank. They lie in host memory and are few.
    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Returns the bytes of rank 0; the others' argument is ignored.
    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>>;

    /// Tells the other ranks how far this rank's device has come: twice the number of sums and gatherings that it has
    /// completed, and one more while it is in one. The device may hang although its host continues.
    fn device_is_at(&self, _tick: u64) {}

    /// Ends this rank with a fault; the others end with it too, in whichever call they are. A rank of several processes
    /// sends it when it leaves (`link`).
    fn fails(&self, _fault: &Fault) {}

    /// Returns the fault that ended the ranks, if one did. Results that a device computed with them since then are not
    /// valid.
    fn ended(&self) -> Option<Fault> {
        None
    }
}

/// One process that trains by itself: sums and exchanges give back what they got.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Collective for Alone {
    fn place(&self) -> Place {
        Place::ALONE
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        check_sum(flat)
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        check_gather(whole, piece, 1)?;
        Ok(whole.slice_set(piece, 0, 0)?)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        Ok(bytes.to_vec())
    }
}

/// Refuses a tensor that `Collective::sum` cannot take: it must be f32, of one dimension, and contiguous.
pub fn check_sum(flat: &Tensor) -> Result<()> {
    if flat.dtype() == DType::F32 && flat.rank() == 1 && flat.is_contiguous() {
        return Ok(());
    }
    let (dtype, shape) = (flat.dtype(), flat.shape());
    Err(Fault::internal(format!("a sum over ranks needs a flat f32 tensor, got {dtype:?} {shape:?}")))
}

/// Refuses tensors that `Collective::gather_into` cannot take: both are flat u8, and `whole` is `world` pieces long.
pub fn check_gather(whole: &Tensor, piece: &Tensor, world: usize) -> Result<()> {
    let flat = |tensor: &Tensor| tensor.dtype() == DType::U8 && tensor.rank() == 1 && tensor.is_contiguous();
    if flat(whole) && flat(piece) && whole.elem_count() == world * piece.elem_count() {
        return Ok(());
    }
    let (whole, piece) = (whole.shape(), piece.shape());
    Err(Fault::internal(format!("{world} pieces of bytes {piece:?} do not fill {whole:?}")))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor<T: candle_core::WithDType>(values: &[T]) -> Tensor {
        Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
    }

    #[test]
    fn one_process_gets_back_what_it_gave() {
        let flat = tensor(&[1f32, -2.5]);
        Alone.sum(&flat).unwrap();
        assert_eq!(flat.to_vec1::<f32>().unwrap(), [1.0, -2.5]);
        let whole = tensor(&[0u8; 3]);
        Alone.gather_into(&whole, &tensor(&[1u8, 2, 3])).unwrap();
        assert_eq!(whole.to_vec1::<u8>().unwrap(), [1, 2, 3]);
        assert_eq!(Alone.exchange(b"own").unwrap(), [b"own".to_vec()]);
        assert_eq!(Alone.broadcast(b"own").unwrap(), b"own");
        assert!(Alone.place().leads() && !Place { rank: 1, ..Place::ALONE }.leads());
    }

    #[test]
    fn tensors_of_another_form_are_refused() {
        let message = Alone.sum(&tensor(&[1f64])).unwrap_err().message;
        assert_eq!(message, "a sum over ranks needs a flat f32 tensor, got F64 [1]");
        let message = Alone.gather_into(&tensor(&[0u8; 3]), &tensor(&[1u8, 2])).unwrap_err().message;
        assert_eq!(message, "1 pieces of bytes [2] do not fill [3]");
    }
}

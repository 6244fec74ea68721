//! Ranks as threads of one process -> the same sums and exchanges as between processes. Tests train with them.
//!
//! A call ends when every rank has made it. If a rank makes another call, is gone or stays silent, every rank's call
//! is an error that names the rank.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::fault::{Fault, Kind, Result};
use crate::ops::flat;

use super::{Collective, Place, check_gather};

/// LIMIT: time that a rank waits for the others.
const PATIENCE: Duration = Duration::from_secs(60);

/// One rank among threads.
pub struct Threads {
    place: Place,
    shared: Arc<Shared>,
    /// The call, counted from 1, at which this rank fails.
    dies_at: Option<u64>,
}

struct Shared {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// A call that ranks are in, or the last one.
struct Meeting {
    /// Number of the call.
    number: u64,
    /// The call that the first rank made.
    what: String,
    /// The bytes of the ranks that came.
    came: Vec<Option<Vec<u8>>>,
    /// The result of the call before, and the ranks that have not fetched it.
    result: Arc<Vec<Vec<u8>>>,
    /// The reason why no later call can succeed.
    broken: Option<Fault>,
}

impl Threads {
    /// Returns the ranks of a world of this size, one for each thread.
    pub fn of(world: usize) -> Vec<Threads> {
        let meeting = Meeting {
            number: 0,
            what: String::new(),
            came: vec![None; world],
            result: Arc::default(),
            broken: None,
        };
        let shared = Arc::new(Shared { meeting: Mutex::new(meeting), changed: Condvar::new() });
        let place = |rank| Place { rank, world, local_rank: rank, local_world: world };
        let rank = |rank| Threads { place: place(rank), shared: shared.clone(), dies_at: None };
        (0..world).map(rank).collect()
    }

    /// Makes this rank fail at its call number `call`, counted from 1.
    pub fn dying_at(self, call: u64) -> Threads {
        // The value is moved field by field, since a `Threads` that is dropped is a rank that is gone.
        let gone = std::mem::ManuallyDrop::new(self);
        Threads { place: gone.place, shared: gone.shared.clone(), dies_at: Some(call) }
    }

    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.shared.meeting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Gives this rank's bytes and returns those of all ranks.
    fn meet(&self, what: &str, bytes: Vec<u8>) -> Result<Arc<Vec<Vec<u8>>>> {
        let mut meeting = self.lock();
        let number = meeting.number + 1;
        if self.dies_at.is_some_and(|at| number >= at) {
            let fault = gone(self.place.rank);
            self.shared.changed.notify_all();
            return Err(meeting.broken.get_or_insert(fault).clone());
        }
        meeting.enter(self.place.rank, what, bytes)?;
        if meeting.came.iter().all(Option::is_some) {
            let came = meeting.came.iter_mut().map(|bytes| bytes.take().expect("every rank came"));
            meeting.result = Arc::new(came.collect());
            meeting.number = number;
        }
        self.shared.changed.notify_all();
        let until = Instant::now() + PATIENCE;
        while meeting.number < number {
            if let Some(fault) = &meeting.broken {
                return Err(fault.clone());
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return Err(meeting.broken.insert(silent(what)).clone());
            };
            meeting = match self.shared.changed.wait_timeout(meeting, left) {
                Ok((meeting, _)) => meeting,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(meeting.result.clone())
    }
}

impl Meeting {
    fn enter(&mut self, rank: usize, what: &str, bytes: Vec<u8>) -> Result<()> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        if self.came.iter().all(Option::is_none) {
            self.what = what.to_owned();
        }
        if self.what != what {
            let text = format!("rank {rank} calls {what} while another rank calls {}", self.what);
            return Err(self.broken.insert(Fault::internal(text)).clone());
        }
        self.came[rank] = Some(bytes);
        Ok(())
    }
}

impl Drop for Threads {
    /// Makes the other ranks' calls errors from now on.
    fn drop(&mut self) {
        let rank = self.place.rank;
        self.lock().broken.get_or_insert_with(|| gone(rank));
        self.shared.changed.notify_all();
    }
}

/// Returns the result of `work` on each rank, each on a thread of its own. A panic of one is a panic here.
pub fn all<T: Send>(ranks: Vec<Threads>, work: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}

fn gone(rank: usize) -> Fault {
    Fault::new(Kind::Device, format!("rank {rank} is gone"))
}

fn silent(what: &str) -> Fault {
    Fault::new(Kind::Device, format!("not every rank came to {what} within {} s", PATIENCE.as_secs()))
}

impl Collective for Threads {
    fn place(&self) -> Place {
        self.place
    }

    /// Takes f64 too, in which tests train. Sums are taken in f64, in the order of the ranks.
    fn sum(&self, flat: &Tensor) -> Result<()> {
        let own = flat.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let bytes = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.meet(&format!("a sum of {} values", own.len()), bytes)?;
        // Adding to -0 changes no bit of a value, and 0 would turn -0 into 0.
        let mut sums = vec![-0f64; own.len()];
        for bytes in all.iter() {
            let values =
                bytes.chunks_exact(8).map(|value| f64::from_le_bytes(value.try_into().expect("8 bytes")));
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        let sums = Tensor::from_vec(sums, own.len(), &Device::Cpu)?.to_dtype(flat.dtype())?;
        Ok(flat::write(flat, &sums)?)
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        check_gather(whole, piece, self.place.world)?;
        let own = piece.to_device(&Device::Cpu)?.to_vec1::<u8>()?;
        let all = self.meet(&format!("a gathering of {} bytes", own.len()), own)?.concat();
        let all = Tensor::from_vec(all, whole.elem_count(), &Device::Cpu)?.to_device(whole.device())?;
        Ok(whole.slice_set(&all, 0, 0)?)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.meet("an exchange", bytes.to_vec())?.to_vec())
    }

    fn fails(&self, fault: &Fault) {
        let fault = fault.clone().at(format!("rank {}", self.place.rank));
        self.lock().broken.get_or_insert(fault);
        self.shared.changed.notify_all();
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let own = if self.place.leads() { bytes.to_vec() } else { Vec::new() };
        Ok(self.meet("a broadcast", own)?[0].clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_gets_the_same() {
        for world in 1..=4 {
            let found = all(Threads::of(world), |ranks| {
                let rank = ranks.place().rank;
                let flat = Tensor::new(&[rank as f32, 0.1, -0.0], &Device::Cpu).unwrap();
                ranks.sum(&flat).unwrap();
                let whole = Tensor::zeros(2 * world, DType::U8, &Device::Cpu).unwrap();
                let piece = Tensor::new(&[rank as u8, 7], &Device::Cpu).unwrap();
                ranks.gather_into(&whole, &piece).unwrap();
                let said = ranks.exchange(&[rank as u8]).unwrap().concat();
                let lead = ranks.broadcast(&[rank as u8 + 3]).unwrap();
                (flat.to_vec1::<f32>().unwrap(), whole.to_vec1::<u8>().unwrap(), said, lead)
            });
            let numbers: Vec<u8> = (0..world as u8).collect();
            let (flat, whole, said, lead) = &found[0];
            assert_eq!(flat[..2], [(0..world).sum::<usize>() as f32, 0.1 * world as f32]);
            assert!(flat[2] == 0.0 && flat[2].is_sign_negative(), "the sum of -0 is -0");
            assert_eq!(*whole, numbers.iter().flat_map(|rank| [*rank, 7]).collect::<Vec<_>>());
            assert_eq!((said, lead), (&numbers, &vec![3]));
            assert!(found.iter().all(|rank| rank == &found[0]));
        }
    }

    #[test]
    fn a_rank_that_is_gone_ends_the_calls_of_all() {
        let mut ranks = Threads::of(3);
        let last = ranks.pop().unwrap().dying_at(2);
        ranks.push(last);
        let found = all(ranks, |ranks| {
            ranks.exchange(b"").unwrap();
            ranks.exchange(b"").unwrap_err().message
        });
        assert_eq!(found, ["rank 2 is gone"; 3]);
    }

    #[test]
    fn calls_that_differ_are_an_error() {
        let found = all(Threads::of(2), |ranks| match ranks.place().rank {
            0 => ranks.exchange(b"").unwrap_err().message,
            _ => ranks.broadcast(b"").unwrap_err().message,
        });
        assert!(found[0] == found[1] && found[0].contains("while another rank calls"), "{found:?}");
    }
}

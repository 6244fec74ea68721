//! SIGTERM, SIGINT and SIGHUP -> one flag that every long loop looks at; a second signal ends the process at once.
//!
//! Kubernetes sends SIGTERM, waits for the grace period and then kills. hone checks the flag between batches of rows,
//! layers and micro-batches, and while it waits for the network, so a checkpoint is at most one micro-batch away, not
//! one epoch. Code of other crates does not check the flag (one long text in a tokenizer, a name lookup). If nothing
//! would be lost, the process therefore ends a moment after the signal in any case.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::fault::{Fault, Kind, Result};
use crate::last_word::{self, Word};

/// The interval at which a wait for the network checks the flag.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Time that the process has to end by itself after a signal, if nothing would be lost.
const PATIENCE: Duration = Duration::from_millis(1500);

static REQUESTED: AtomicBool = AtomicBool::new(false);
/// Whether SIGTERM or SIGINT came, so that the next one is the second.
static TOLD: AtomicBool = AtomicBool::new(false);
static STANDING: AtomicU8 = AtomicU8::new(Standing::Stay as u8);
/// Folders of files that are of no use until all are there.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The work that would be lost if the process ended now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// Something would be lost. The process ends by itself as soon as that is saved.
    Stay = 0,
    /// Nothing would be lost: training has not begun.
    BeforeTraining = 1,
    /// Nothing would be lost: the adapter is complete on disk and is being pushed.
    Pushing = 2,
    /// Nothing would be lost: the process only reads or fetches something.
    Looking = 3,
}

impl Standing {
    fn fault(self) -> Option<Fault> {
        match self {
            Standing::Stay => None,
            Standing::BeforeTraining => Some(before_training()),
            Standing::Pushing => Some(
                Fault::new(
                    Kind::Interrupted,
                    "stopped by a signal while pushing; the adapter is whole on disk",
                )
                .help("start it again: only the push is left"),
            ),
            Standing::Looking => Some(while_looking()),
        }
    }

    const ALL: [Standing; 4] =
        [Standing::Stay, Standing::BeforeTraining, Standing::Pushing, Standing::Looking];
}

/// Guard of a [`Standing`]: it holds until the value is dropped, then the standing before it holds again.
#[must_use]
#[derive(Debug)]
pub struct Stands(u8);

impl Stands {
    /// Keeps the standing until the process ends.
    pub fn to_the_end(self) {
        std::mem::forget(self);
    }
}

impl Drop for Stands {
    fn drop(&mut self) {
        STANDING.store(self.0, Ordering::SeqCst);
    }
}

/// Sets what would be lost from now on, until the returned guard is dropped.
pub fn stands(standing: Standing) -> Stands {
    Stands(STANDING.swap(standing as u8, Ordering::SeqCst))
}

/// Guard of an unfinished folder: until it is dropped, the folder goes if a signal ends the process.
#[must_use]
#[derive(Debug)]
pub struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        all_unfinished().retain(|folder| *folder != self.0);
    }
}

/// Names a folder that is of no use until it is finished.
pub fn unfinished(folder: &Path) -> Unfinished {
    all_unfinished().push(folder.to_owned());
    Unfinished(folder.to_owned())
}

fn all_unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts listening for signals. Call this once, early in `main`.
pub fn listen() -> Result<()> {
    let failed = |error| Fault::machine("listen for signals", &error);
    let (woken, wake) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGTERM, SIGINT] {
        let heard = || {
            REQUESTED.store(true, Ordering::SeqCst);
            if TOLD.swap(true, Ordering::SeqCst) {
                last_word::second_signal();
                signal_hook::low_level::exit(Kind::InterruptedUnsaved.exit_code().into());
            }
        };
        // SAFETY: the handler sets flags, and on a second signal makes system calls on bytes that are ready.
        unsafe { signal_hook::low_level::register(signal, heard) }.map_err(failed)?;
        signal_hook::low_level::pipe::register(signal, wake.try_clone().map_err(failed)?).map_err(failed)?;
    }
    // A closed terminal sends SIGHUP twice, from the kernel and from the shell, so it is never the second signal.
    if !is_ignored(SIGHUP) {
        signal_hook::low_level::pipe::register(SIGHUP, wake.try_clone().map_err(failed)?).map_err(failed)?;
    }
    let words = Standing::ALL.map(|standing| standing.fault().map(|fault| Word::of(&fault)));
    static WORDS: OnceLock<[Option<Word>; 4]> = OnceLock::new();
    let words = WORDS.get_or_init(|| words);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || end_where_nothing_is_lost(woken, words))
        .map(drop)
        .map_err(failed)
}

/// Returns whether the process began with this signal ignored, as `nohup` begins it.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    (mask >> (signal - 1)) & 1 == 1
}

/// Waits for a signal, then gives the process time to end by itself. If it does not and nothing would be lost, ends
/// it.
fn end_where_nothing_is_lost(mut woken: UnixStream, words: &[Option<Word>; 4]) {
    if woken.read_exact(&mut [0]).is_err() {
        return;
    }
    REQUESTED.store(true, Ordering::SeqCst);
    std::thread::sleep(PATIENCE);
    loop {
        if let Some(word) = &words[usize::from(STANDING.load(Ordering::SeqCst))] {
            // Nobody finishes a folder from here on: the lock is held until the process is gone.
            let unfinished = all_unfinished();
            for folder in unfinished.iter() {
                let _ = std::fs::remove_dir_all(folder); // the next start removes what stays
            }
            word.speak();
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Returns whether a signal asked the process to end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Fails if a signal asked the process to end. It serves loops that have nothing of their own to save.
pub fn check() -> Result<()> {
    match requested() {
        false => Ok(()),
        true => Err(stopped()),
    }
}

/// The fault of a signal where nothing is lost but time: before training, or in a command that trains nothing.
pub fn stopped() -> Fault {
    match STANDING.load(Ordering::SeqCst) == Standing::Looking as u8 {
        true => while_looking(),
        false => before_training(),
    }
}

fn while_looking() -> Fault {
    Fault::new(Kind::InterruptedUnsaved, "stopped by a signal").help("start it again")
}

fn before_training() -> Fault {
    Fault::new(Kind::InterruptedUnsaved, "stopped by a signal before training began")
        .help("start it again: downloaded files are kept")
}

/// Returns the result of `work`. If a signal comes first, `work` is dropped and the result is the fault that `stopped`
/// returns.
pub async fn or_stopped<T>(
    work: impl Future<Output = Result<T>>,
    stopped: impl FnOnce() -> Fault,
) -> Result<T> {
    let signal = async {
        while !requested() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::select! {
        done = work => done,
        () = signal => Err(stopped()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_lost_is_said_inside_out() {
        let now = || STANDING.load(Ordering::SeqCst);
        let before = now();
        {
            let _outer = stands(Standing::BeforeTraining);
            {
                let _inner = stands(Standing::Stay);
                assert_eq!(now(), Standing::Stay as u8);
            }
            assert_eq!(now(), Standing::BeforeTraining as u8);
        }
        assert_eq!(now(), before);
        {
            let _looks = stands(Standing::Looking);
            assert_eq!(stopped().message, "stopped by a signal");
        }
        for standing in Standing::ALL {
            assert_eq!(Standing::ALL[standing as usize], standing, "words are found by their number");
        }
    }

    #[test]
    fn a_folder_is_unfinished_until_its_guard_is_dropped() {
        let folder = Path::new("/a/folder/of/this/test");
        let is_listed = || all_unfinished().iter().any(|listed| listed == folder);
        let guard = unfinished(folder);
        assert!(is_listed());
        drop(guard);
        assert!(!is_listed());
    }
}

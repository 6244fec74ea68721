//! Foreign content -> a parser's result, within limits on memory and stack; panics become errors.
//!
//! Parsers of other crates reserve as much memory as a file declares, recurse as deep as it nests, and panic on some
//! damage. A check refuses each known case before the parser sees it. This module catches the unknown cases. Within
//! [`Bounds`] a thread may allocate only so much memory. If the parser asks for more, or overflows the stack, the
//! process ends with the exit code and the message of the content's fault, since neither can be recovered from. The
//! process also ends if a parser on a thread of its own computes without end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::fault::{Fault, Kind, Result};
use crate::last_word::{self, Word};

/// The value of `LEFT` if the thread has no bounds.
const UNBOUNDED: isize = isize::MAX;
/// LIMIT: processor time of a parser that computes without bounds of its own. Real content takes milliseconds.
const COMPUTING_MAX: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
const HELP: &str = "the content is damaged or malicious: take it from a source that you trust";
/// LIMIT: stack of a thread for parsers that recurse deeply. Its pages are only allocated when used.
pub const STACK_BYTES: usize = 256 << 20;

thread_local! {
    /// Bytes that this thread may still allocate.
    static LEFT: Cell<isize> = const { Cell::new(UNBOUNDED) };
}

/// The system's allocator, limited to the thread's bounds.
struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// Subtracts `bytes` from the rest. Returns false if the rest is too small.
fn take(bytes: usize) -> bool {
    let left = LEFT.get();
    if left == UNBOUNDED {
        return true;
    }
    match isize::try_from(bytes).ok().and_then(|bytes| left.checked_sub(bytes)).filter(|left| *left >= 0) {
        Some(left) => {
            LEFT.set(left);
            true
        }
        // A panic needs memory for its message, and holds locks while it writes it.
        None => std::thread::panicking(),
    }
}

fn give_back(bytes: usize) {
    let left = LEFT.get();
    if left != UNBOUNDED {
        LEFT.set(left.saturating_add_unsigned(bytes).min(UNBOUNDED - 1));
    }
}

/// Notes if the system gave no memory, so that the final message says so.
fn told(memory: *mut u8) -> *mut u8 {
    if memory.is_null() {
        last_word::note_full_memory();
    }
    memory
}

// SAFETY: every call is passed on to the system's allocator with the same layout, or answered with null, which the
// trait allows. The count is a plain number of this thread, read and written without an allocation.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if take(layout.size()) { told(unsafe { System.alloc(layout) }) } else { std::ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if take(layout.size()) { told(unsafe { System.alloc_zeroed(layout) }) } else { std::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if !take(bytes.saturating_sub(layout.size())) {
            return std::ptr::null_mut();
        }
        give_back(layout.size().saturating_sub(bytes));
        // SAFETY: as the caller promises.
        told(unsafe { System.realloc(memory, layout, bytes) })
    }
}

/// The memory that a piece of foreign content may take, and the message if it takes more.
#[derive(Debug)]
pub struct Bounds {
    kind: Kind,
    what: String,
    bytes: usize,
    word: Word,
}

impl Bounds {
    /// `what` names the content (a file, the chat template). `kind` says who must act if it cannot be read.
    pub fn new(kind: Kind, what: impl Into<String>, bytes: usize) -> Bounds {
        let what = what.into();
        let message =
            format!("{what}: reading it takes more than {} MB of memory, or nests too deep", bytes >> 20);
        let fault = Fault::new(kind, message).help(HELP);
        Bounds { kind, word: Word::of(&fault), what, bytes }
    }

    /// Runs `work`, which may allocate at most `bytes` more than the thread already has.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        /// Restores the thread's own bounds, less the memory that `work` keeps.
        struct Back {
            outer: isize,
            inner: isize,
        }
        impl Drop for Back {
            fn drop(&mut self) {
                let kept = self.inner - LEFT.get();
                LEFT.set(match self.outer {
                    UNBOUNDED => UNBOUNDED,
                    outer => outer.saturating_sub(kept),
                });
            }
        }
        let outer = LEFT.get();
        let inner = outer.min(isize::try_from(self.bytes).unwrap_or(UNBOUNDED - 1));
        let _back = Back { outer, inner };
        LEFT.set(inner);
        last_word::unless(&self.word, work)
    }

    /// Does `work` as `within` does, and turns a panic into a fault of the content.
    pub fn hold<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(|| self.within(work))).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Fault::new(self.kind, format!("{}: the reader gave up: {said}", self.what))
                .help("the content is damaged, or of a kind that is not supported"))
        })
    }

    /// Does `work` as `hold` does, on a thread with `stack_bytes` of stack, for parsers that recurse as deep as their
    /// input nests. If it computes for longer than `COMPUTING_MAX`, the process ends: a thread cannot be ended alone.
    pub fn hold_deep<T: Send>(
        &self,
        stack_bytes: usize,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        std::thread::scope(|scope| {
            let (sender, place) = channel();
            let thread = std::thread::Builder::new().name("reader".into()).stack_size(stack_bytes);
            let thread = thread.spawn_scoped(scope, move || {
                // The channel closes when the work has ended.
                let _ = sender.send(std::fs::read_link("/proc/thread-self"));
                let held = self.hold(work);
                drop(sender);
                held
            });
            match thread {
                Ok(thread) => {
                    self.watch(&place, COMPUTING_MAX, |word| word.speak());
                    thread.join().expect("`hold` catches every panic")
                }
                Err(error) => Err(Fault::machine("start a thread", &error).at(&self.what)),
            }
        })
    }

    /// Waits for the end of a thread, whose place in /proc comes first. Calls `late` if it has computed for `most`.
    fn watch(&self, place: &Receiver<std::io::Result<PathBuf>>, most: Duration, late: impl Fn(&Word)) {
        let Ok(Ok(thread)) = place.recv() else { return };
        while let Err(RecvTimeoutError::Timeout) = place.recv_timeout(LOOK_INTERVAL) {
            if computed(&Path::new("/proc").join(&thread)).is_some_and(|computed| computed >= most) {
                let seconds = most.as_secs();
                let fault =
                    Fault::new(self.kind, format!("{}: reading it takes more than {seconds} s", self.what))
                        .help(HELP);
                return late(&Word::of(&fault));
            }
        }
    }
}

/// Returns the processor time of a thread, by its place in /proc.
fn computed(thread: &Path) -> Option<Duration> {
    let stat = std::fs::read_to_string(thread.join("stat")).ok()?;
    // The name, in parentheses, may hold anything. Behind it, the 12th and 13th fields are hundredths of seconds.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let hundredths = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Duration::from_millis(10 * (hundredths(11)? + hundredths(12)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(bytes: usize) -> Bounds {
        Bounds::new(Kind::Data, "a.parquet", bytes)
    }

    #[test]
    fn a_thread_gets_what_its_bounds_allow_and_no_more() {
        bounds(1 << 20).within(|| {
            let mut some = Vec::<u8>::new();
            assert!(some.try_reserve_exact(1 << 19).is_ok());
            assert!(Vec::<u8>::new().try_reserve_exact(1 << 20).is_err(), "half is taken");
            drop(some);
            let mut again = Vec::<u8>::new();
            assert!(again.try_reserve_exact((1 << 20) - 4096).is_ok(), "what is freed may be taken again");
            let mut grown: Vec<u8> = vec![1; 1024];
            assert!(grown.try_reserve_exact(1 << 19).is_err(), "growing counts too");
        });
        assert_eq!(LEFT.get(), UNBOUNDED);
        assert!(Vec::<u8>::new().try_reserve_exact(4 << 20).is_ok());
    }

    #[test]
    fn bounds_within_bounds_hold_both() {
        bounds(1 << 20).within(|| {
            let kept = bounds(1 << 30).within(|| {
                assert!(Vec::<u8>::new().try_reserve_exact(2 << 20).is_err(), "the outer ones hold");
                vec![0u8; 1 << 19]
            });
            assert!(Vec::<u8>::new().try_reserve_exact(3 << 18).is_err(), "what the inner work keeps counts");
            assert_eq!(kept.len(), 1 << 19);
        });
    }

    /// A thread that computes is distinguished from one that waits.
    #[test]
    fn a_reader_that_computes_without_end_is_noticed() {
        let noticed = |work: fn()| {
            let (sender, place) = channel();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    sender.send(std::fs::read_link("/proc/thread-self")).unwrap();
                    work();
                    drop(sender);
                });
                let late = Cell::new(false);
                bounds(1 << 20).watch(&place, Duration::from_millis(100), |_| late.set(true));
                late.get()
            })
        };
        assert!(!noticed(|| std::thread::sleep(Duration::from_millis(300))));
        assert!(noticed(|| {
            let own = || computed(Path::new("/proc/thread-self")).unwrap();
            while own() < Duration::from_millis(400) {}
        }));
    }

    #[test]
    fn panics_become_faults_of_the_content() {
        let fault = bounds(1 << 20).hold(|| -> Result<()> { panic!("divide by {}", 0) }).unwrap_err();
        assert_eq!(
            (fault.kind, fault.message.as_str()),
            (Kind::Data, "a.parquet: the reader gave up: divide by 0")
        );
        let deep = bounds(1 << 20).hold_deep(64 << 20, || {
            fn nest(depth: u32) -> u32 {
                if depth == 0 { 0 } else { std::hint::black_box([depth; 64])[0].min(1) + nest(depth - 1) }
            }
            Ok(nest(50_000))
        });
        assert_eq!(deep.unwrap(), 50_000);
    }
}

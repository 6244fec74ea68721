//! A sudden end of the process (an abort, a full stack, a mapped file that is cut, a second signal) -> an exit code, a
//! line in the log, and Kubernetes' termination message.
//!
//! Text cannot be formatted in such an end, since most of the standard library may not be called in a signal handler.
//! So the messages (`Word`) are made beforehand: one for each event that can end the process, and one for the content
//! that a thread is reading.

use std::cell::Cell;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::fault::{Fault, Kind};
use crate::report::termination::{self, Outcome};

/// The message of a sudden end, as ready bytes.
#[derive(Debug)]
pub struct Word {
    code: i32,
    message: Vec<u8>,
    said: Vec<u8>,
}

/// The values that are prepared once and stay the same until the process ends.
struct Prepared {
    /// The file of Kubernetes' message.
    place: Option<CString>,
    defect: Word,
    lost_file: Word,
    no_memory: Word,
    second_signal: Word,
}

static PREPARED: OnceLock<Prepared> = OnceLock::new();
/// Whether the log is JSON lines.
static JSON: AtomicBool = AtomicBool::new(false);
/// Whether a parent process reads file descriptor 0 to learn that a last word was written.
static WATCHED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static NOW: Cell<*const Word> = const { Cell::new(std::ptr::null()) };
    static OUT_OF_MEMORY: Cell<bool> = const { Cell::new(false) };
}

/// Prepares all messages; called once, at the start of the program. `place` is the file of Kubernetes' message.
/// `json` is true if the log is JSON lines. `watched` is true if a parent process reads what this process writes to
/// file descriptor 0.
pub fn prepare(place: Option<&Path>, json: bool, watched: bool) {
    JSON.store(json, Ordering::Relaxed);
    WATCHED.store(watched, Ordering::Relaxed);
    let prepared = Prepared {
        place: place.and_then(|place| CString::new(place.as_os_str().as_bytes()).ok()),
        defect: Word::of(&Fault::internal("hone aborted; the lines above say where").help(
            "please report them with the job's configuration; started again, it continues from its newest checkpoint",
        )),
        lost_file: Word::of(
            &Fault::new(Kind::Storage, "a file that hone was reading was cut, or its disk failed (SIGBUS)")
                .help("start it again: what was damaged is made or downloaded again"),
        ),
        no_memory: Word::of(
            &Fault::capacity("memory is full: the system refused to give hone more")
                .help("give the container more memory, or lower TrainingArguments.max_length"),
        ),
        second_signal: Word::of(
            &Fault::new(Kind::InterruptedUnsaved, "stopped at once by a second signal")
                .help("start it again: it continues from its newest checkpoint"),
        ),
    };
    if PREPARED.set(prepared).is_ok() {
        hear_aborts();
        hear_faults();
    }
}

/// Runs `work`. If `work` aborts the process (its stack overflows, or an allocation fails), `word` is written before
/// the process ends.
pub fn unless<T>(word: &Word, work: impl FnOnce() -> T) -> T {
    /// Restores the previous word, also if `work` panics.
    struct Back(*const Word);
    impl Drop for Back {
        fn drop(&mut self) {
            NOW.set(self.0);
        }
    }
    let _back = Back(NOW.replace(word));
    work()
}

/// Bytes of a thread's stack for signals: two frames of a thread that uses AMX, each of 11 KiB, and the memory of
/// handlers.
const SIGNAL_STACK_BYTES: usize = 64 << 10;
/// Bytes below it that no one may touch.
const GUARD_BYTES: usize = 4 << 10;

/// Gives this thread a larger stack for signals, once. The standard library's has room for one frame of registers and
/// little else; AMX's tiles make that frame 8 KiB larger, so that a handler would run beyond its stack.
pub fn widen_signal_stack() {
    thread_local! {
        static WIDE: SignalStack = SignalStack::install();
    }
    // A thread that is about to end keeps what it has.
    let _ = WIDE.try_with(|_| ());
}

/// A thread's stack for signals, with a guard below. Null: the system gave none, and the one of before stays.
struct SignalStack(*mut libc::c_void);

impl SignalStack {
    fn install() -> SignalStack {
        let (bytes, none) = (GUARD_BYTES + SIGNAL_STACK_BYTES, std::ptr::null_mut());
        // SAFETY: the mapping is new and belongs to this value; the kernel is given the part of it above the guard.
        unsafe {
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let memory = libc::mmap(none, bytes, access, kind, -1, 0);
            if memory == libc::MAP_FAILED {
                return SignalStack(none);
            }
            libc::mprotect(memory, GUARD_BYTES, libc::PROT_NONE);
            let stack =
                libc::stack_t { ss_sp: memory.add(GUARD_BYTES), ss_flags: 0, ss_size: SIGNAL_STACK_BYTES };
            libc::sigaltstack(&stack, std::ptr::null_mut());
            SignalStack(memory)
        }
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        // SAFETY: the thread ends. The kernel forgets the stack before its memory goes, unless it has another one.
        unsafe {
            let mut now: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &mut now);
            if now.ss_sp == self.0.add(GUARD_BYTES) {
                now.ss_flags = libc::SS_DISABLE;
                libc::sigaltstack(&now, std::ptr::null_mut());
            }
            libc::munmap(self.0, GUARD_BYTES + SIGNAL_STACK_BYTES);
        }
    }
}

/// Notes that the system gave no memory. The allocator calls this.
pub fn note_full_memory() {
    OUT_OF_MEMORY.set(true);
}

/// Writes the message of a second signal and ends the process; called by the signal handler.
pub fn second_signal() {
    if let Some(prepared) = PREPARED.get() {
        prepared.second_signal.speak();
    }
}

/// Ends the process at once and without a word, since another process reports why.
pub fn leave(code: u8) -> ! {
    // SAFETY: ends the process; nothing of it is used afterwards.
    unsafe { libc::_exit(code.into()) }
}

impl Word {
    /// Returns the message as the log and the termination message would show the fault.
    pub fn of(fault: &Fault) -> Word {
        let outcome = Outcome { fault: Some(fault.clone()), ..Outcome::default() };
        let (code, name) = (fault.kind.exit_code(), fault.kind.name());
        let said = match JSON.load(Ordering::Relaxed) {
            true => format!(
                "{}\n",
                serde_json::json!({"level": "ERROR", "kind": name, "exit_code": code, "help": fault.help, "message": fault.message})
            ),
            false => format!("error ({name}, exit code {code}): {fault}\n"),
        };
        Word { code: code.into(), message: termination::line(&outcome).into_bytes(), said: said.into_bytes() }
    }

    /// Writes the message and ends the process. It allocates nothing and takes no lock, so that a signal handler may
    /// call it.
    pub fn speak(&self) -> ! {
        if let Some(place) = PREPARED.get().and_then(|prepared| prepared.place.as_ref()) {
            // SAFETY: system calls on a text that ends with zero and lives as long as the process.
            unsafe {
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NONBLOCK;
                let file = libc::open(place.as_ptr(), flags, 0o644);
                if file >= 0 {
                    // The file is cut afterwards, so that it is never empty.
                    libc::write(file, self.message.as_ptr().cast(), self.message.len());
                    libc::ftruncate(file, self.message.len() as libc::off_t);
                }
            }
        }
        // SAFETY: system calls on bytes that live until the end; the last one does not return.
        unsafe {
            libc::write(libc::STDERR_FILENO, self.said.as_ptr().cast(), self.said.len());
            if WATCHED.load(Ordering::Relaxed) {
                libc::write(libc::STDIN_FILENO, self.said.as_ptr().cast(), 1);
            }
            libc::_exit(self.code)
        }
    }
}

type Handler = extern "C" fn(libc::c_int, *const libc::siginfo_t, *const libc::c_void);

/// Handles SIGABRT. The standard library raises it after it has printed an explanation: when a stack overflows, an
/// allocation fails, or a panic cannot continue.
fn hear_aborts() {
    // SAFETY: the action is a zeroed C structure with its handler and flags set; the handler only reads what is ready
    // and makes system calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = aborted as Handler as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
        libc::sigaction(libc::SIGABRT, &action, std::ptr::null_mut());
    }
}

extern "C" fn aborted(_: libc::c_int, about: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel gives a whole structure; the calls only read numbers.
    let is_own = unsafe { !about.is_null() && (*about).si_pid() == libc::getpid() };
    let now = NOW.get();
    // Another process that aborts this one says nothing about what is read at this moment.
    if is_own && !now.is_null() {
        // SAFETY: `unless` sets it for as long as the borrowed word lives, on this very thread.
        unsafe { &*now }.speak();
    }
    if let Some(prepared) = PREPARED.get() {
        let word = if OUT_OF_MEMORY.get() { &prepared.no_memory } else { &prepared.defect };
        word.speak();
    }
}

/// Signals of an instruction that cannot be executed.
const FAULTS: [libc::c_int; 4] = [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL, libc::SIGFPE];
/// The handler that each of these signals had before.
static BEFORE: [AtomicUsize; FAULTS.len()] = [const { AtomicUsize::new(libc::SIG_DFL) }; FAULTS.len()];

/// Handles the signals of faulty instructions after the standard library has. A write beyond the limit of a file's size
/// becomes an error like that of a full disk.
fn hear_faults() {
    // SAFETY: the actions are zeroed C structures with their handler and flags set; the kernel fills the second one.
    // The handler only reads numbers and makes system calls.
    unsafe {
        for (signal, before) in FAULTS.into_iter().zip(&BEFORE) {
            let (mut action, mut old): (libc::sigaction, libc::sigaction) =
                (std::mem::zeroed(), std::mem::zeroed());
            libc::sigaction(signal, std::ptr::null(), &mut old);
            if old.sa_flags & libc::SA_SIGINFO != 0 {
                before.store(old.sa_sigaction, Ordering::Relaxed);
            }
            action.sa_sigaction = faulted as Handler as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

extern "C" fn faulted(signal: libc::c_int, about: *const libc::siginfo_t, context: *const libc::c_void) {
    let before =
        FAULTS.iter().position(|fault| *fault == signal).map(|place| BEFORE[place].load(Ordering::Relaxed));
    if let Some(before) = before.filter(|before| *before != libc::SIG_DFL) {
        // SAFETY: the kernel gave this function as a handler of this form. The standard library's does not come back if
        // a stack is full.
        unsafe { std::mem::transmute::<usize, Handler>(before)(signal, about, context) };
    }
    if let Some(prepared) = PREPARED.get() {
        let word = if signal == libc::SIGBUS { &prepared.lost_file } else { &prepared.defect };
        word.speak();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_ready_in_both_forms() {
        let word = Word::of(&Fault::data("a.parquet: too deep").help("export it again"));
        assert_eq!(word.code, 11);
        assert!(
            String::from_utf8(word.said).unwrap().contains("error (data, exit code 11): a.parquet: too deep")
        );
        let message: serde_json::Value = serde_json::from_slice(&word.message).unwrap();
        assert_eq!((&message["code"], &message["help"]), (&11.into(), &"export it again".into()));
    }

    /// Returns the stack that the kernel uses for signals of this thread: its lowest address, and its bytes.
    fn signal_stack() -> (usize, usize) {
        // SAFETY: the kernel fills the structure.
        unsafe {
            let mut now: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &mut now);
            (now.ss_sp as usize, now.ss_size)
        }
    }

    #[test]
    fn a_signal_has_room_for_its_frame_and_a_handler() {
        let narrow = signal_stack();
        let wide = std::thread::spawn(|| {
            widen_signal_stack();
            let wide = signal_stack();
            widen_signal_stack();
            assert_eq!(signal_stack(), wide, "once is enough");
            wide
        });
        assert_eq!(wide.join().unwrap().1, SIGNAL_STACK_BYTES);
        assert_eq!(signal_stack(), narrow, "another thread's stays as it is");
    }

    #[test]
    fn the_word_of_before_comes_back_also_after_a_panic() {
        let words = ["outer", "inner"].map(|text| Word::of(&Fault::data(text)));
        unless(&words[0], || {
            let caught = std::panic::catch_unwind(|| unless(&words[1], || panic!("inside")));
            assert!(caught.is_err());
            assert!(std::ptr::eq(NOW.get(), &words[0]));
        });
        assert!(NOW.get().is_null());
    }
}

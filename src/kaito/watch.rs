//! Runs the job as a child process -> its exit code. If the job was killed, KAITO's containers are ended too.
//!
//! A process that is killed (by the kernel for its memory, or by an abort in a driver) cannot end the containers that
//! wait for it. Its parent process can.

use std::io::{PipeReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use super::sidecars::{self, Limits};
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage, termination};

/// Variable that is set in the child.
const CHILD: &str = "HONE_KAITO_JOB";
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Returns whether this process is the job itself.
pub fn is_job(environment: &dyn Fn(&str) -> Option<String>) -> bool {
    environment(CHILD).is_some()
}

/// Runs the same command line again as the job, passes signals on to it, and returns its exit code: its own, or 128
/// plus the number of the signal that killed it.
///
/// Internal: the job cannot be started.
pub fn watch(limits: Limits, report: &Report) -> Result<u8> {
    interrupt::listen()?;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let failed = |error| Fault::machine("start the job", &error);
    let (last_word, said_here) = std::io::pipe().map_err(failed)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .env(CHILD, "1")
        // A job reads nothing from its standard input. It writes to it if it ends without its own clean-up.
        .stdin(said_here)
        .spawn()
        .map_err(failed)?;
    let status = wait(&mut child)?;
    if let Some(code) = status.code() {
        if ended_at_once(last_word) {
            sidecars::end(limits, report);
        }
        return Ok(code as u8);
    }
    let signal = status.signal().unwrap_or(0);
    let fault = killed(signal);
    report.warn(Stage::Train, fault.message.clone());
    if let Some(path) = termination::path() {
        termination::write(
            &path,
            &termination::Outcome { fault: Some(fault), ..termination::Outcome::default() },
        );
    }
    sidecars::end(limits, report);
    Ok(128 + signal as u8)
}

/// Returns whether the job wrote a last word. A job that does so has not ended the containers that wait for it.
fn ended_at_once(mut last_word: PipeReader) -> bool {
    last_word.read(&mut [0]).is_ok_and(|bytes| bytes > 0)
}

/// Waits for the job. A signal to this process is passed on to the job, which writes its checkpoint and ends.
fn wait(child: &mut Child) -> Result<ExitStatus> {
    let mut told = false;
    loop {
        let status =
            child.try_wait().map_err(|error| Fault::internal(format!("cannot wait for the job: {error}")))?;
        if let Some(status) = status {
            return Ok(status);
        }
        if interrupt::requested() && !told {
            told = true;
            // SAFETY: takes two numbers; the child has not been waited for, so the number is still its own.
            unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn killed(signal: i32) -> Fault {
    match signal {
        libc::SIGKILL => Fault::new(
            Kind::Capacity,
            "the job was killed (signal 9), most likely because it ran out of memory",
        )
        .help("give the pod more memory, or lower TrainingArguments.max_length"),
        _ => Fault::new(Kind::Device, format!("the job was killed by signal {signal}"))
            .help("the end of its log may say why; if it fails twice on the same node, look at nvidia-smi"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_end_is_told() {
        let ended =
            |command: &str| wait(&mut Command::new("sh").args(["-c", command]).spawn().unwrap()).unwrap();
        assert_eq!(ended("exit 11").code(), Some(11));
        assert_eq!(ended("kill -9 $$").signal(), Some(9));
        assert_eq!((killed(9).kind, killed(6).kind), (Kind::Capacity, Kind::Device));
    }
}

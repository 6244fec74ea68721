//! The end of a job -> the end of KAITO's other containers in the pod, so that the pod ends and frees its GPU.
//!
//! With an image as output, the pod has two more containers in the same process namespace. `pusher` polls for the
//! sentinel, packs and pushes, and then signals `pause`, which only waits for this signal. If training or the push
//! fails, nobody sends any signal: the pod stays Running, its Job neither fails nor retries, and the GPU stays in
//! use. So hone, which trains, ends them. A failed push is different: KAITO keeps the pod so that the result can be
//! fetched. hone keeps it too, but for a limited time.
//!
//! A process of these containers is recognised by its command line, and by its session, which is not hone's: a
//! container's first process leads a session. PID 1 holds the pod together and is never signalled.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::report::{Report, Stage};
use crate::run_folder::SENTINEL;

const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Time between SIGTERM and SIGKILL. It is also the time that a pusher's last signal has to arrive.
const GRACE: Duration = Duration::from_secs(5);

/// Time limits of the waits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time for the containers to start. kubelet starts them after hone's container, and pulls their images first
    /// (`HONE_KAITO_START`).
    pub start: Duration,
    /// Time that a pod is kept after its push failed (`HONE_KAITO_HOLD`).
    pub hold: Duration,
}

impl Limits {
    /// Reads the limits from the environment.
    ///
    /// # Errors
    /// Config: a variable is not a number of seconds.
    pub fn read(environment: &dyn Fn(&str) -> Option<String>) -> Result<Limits> {
        let seconds = |name: &str, default: u64| match environment(name).filter(|text| !text.is_empty()) {
            None => Ok(Duration::from_secs(default)),
            Some(text) => text
                .parse()
                .map(Duration::from_secs)
                .map_err(|_| Fault::config(format!("{name}: expected a number of seconds, found {text:?}"))),
        };
        Ok(Limits { start: seconds("HONE_KAITO_START", 600)?, hold: seconds("HONE_KAITO_HOLD", 3600)? })
    }
}

/// Ends pusher and pause after a failure, including containers that have not started yet.
pub fn end(limits: Limits, report: &Report) {
    if shared() {
        report.note(Stage::Push, "the job failed: KAITO's pusher and pause are ended, so that the pod ends");
        end_both([false; 2], limits, report);
    }
}

/// Ends both. `seen` is whether pusher and pause have been seen.
fn end_both(mut seen: [bool; 2], limits: Limits, report: &Report) {
    let began = Instant::now();
    let mut ending = Ending::default();
    loop {
        let found = Neighbours::look();
        seen = [seen[0] || !found.pusher.is_empty(), seen[1] || !found.pause.is_empty()];
        let left = ending.signal(found.pusher.iter().chain(&found.pause), report);
        // If a signal asked hone to end, kubelet asks the other containers itself.
        let complete = seen == [true; 2] || interrupt::requested();
        if !left && complete {
            return;
        }
        if !left && began.elapsed() >= limits.start {
            let name = if seen[0] { "pause" } else { "pusher" };
            report
                .warn(Stage::Push, format!("KAITO's {name} container has not started in {:?}", limits.start));
            return;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Waits for the pusher after the sentinel is written. If the push fails or a signal arrives, ends the remaining
/// containers.
///
/// Push: the pusher ended without releasing the pause; the pod was kept for `limits.hold`. Interrupted: a signal
/// arrived.
pub fn pushed(limits: Limits, report: &Report) -> Result<()> {
    if !shared() {
        return Ok(());
    }
    report.note(Stage::Push, "the adapter is whole: waiting for KAITO's pusher");
    let ended = wait_for_push(limits, report);
    if ended.is_err() {
        end_both([true; 2], limits, report);
    }
    ended
}

fn wait_for_push(limits: Limits, report: &Report) -> Result<()> {
    if !wait(limits.start, |found| !found.pusher.is_empty())? {
        report.warn(Stage::Push, format!("KAITO's pusher has not started in {:?}", limits.start));
        return Ok(());
    }
    wait(Duration::MAX, |found| found.pusher.is_empty())?;
    if wait(GRACE, |found| found.pause.is_empty())? {
        return Ok(());
    }
    report.warn(
        Stage::Push,
        format!(
            "KAITO's pusher ended without a push. The adapter is whole in this container's output folder: fetch it within \
             {} s (`kubectl cp`, or `kubectl exec POD -- hone push FOLDER IMAGE`); after that the pod ends",
            limits.hold.as_secs()
        ),
    );
    wait(limits.hold, |found| found.pause.is_empty())?;
    Err(Fault::new(Kind::Push, "KAITO's pusher ended without a push")
        .help("its container's log says why: `kubectl logs POD -c pusher`"))
}

/// Waits until `what` is true; returns false if that takes longer than `limit`.
fn wait(limit: Duration, what: impl Fn(&Neighbours) -> bool) -> Result<bool> {
    let began = Instant::now();
    loop {
        if what(&Neighbours::look()) {
            return Ok(true);
        }
        if interrupt::requested() {
            return Err(Fault::new(
                Kind::Interrupted,
                "stopped by a signal while waiting for KAITO's pusher",
            )
            .help("the adapter is whole in the output folder"));
        }
        if began.elapsed() >= limit {
            return Ok(false);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// The processes that were signalled, and when.
#[derive(Default)]
struct Ending {
    asked: HashMap<i32, Instant>,
    refused: bool,
}

impl Ending {
    /// Sends SIGTERM to each process once, and SIGKILL if it has not ended in time. Returns whether a process is left
    /// that may still end.
    fn signal<'a>(&mut self, pids: impl Iterator<Item = &'a i32>, report: &Report) -> bool {
        let mut left = false;
        for &pid in pids {
            let signal = match self.asked.get(&pid) {
                None => libc::SIGTERM,
                Some(asked) if asked.elapsed() >= GRACE => libc::SIGKILL,
                Some(_) => {
                    left |= !self.refused;
                    continue;
                }
            };
            self.asked.entry(pid).or_insert_with(Instant::now);
            // SAFETY: the call takes two numbers. The process was found a moment ago and is neither PID 1 nor one of
            // ours.
            let sent = unsafe { libc::kill(pid, signal) } == 0;
            if !sent && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM) {
                self.refuse(report);
            }
            left |= !self.refused;
        }
        left
    }

    fn refuse(&mut self, report: &Report) {
        if !std::mem::replace(&mut self.refused, true) {
            report.warn(
                Stage::Push,
                "no permission to end KAITO's pusher and pause: the pod will not end by itself. Run this container as root \
                 with the capability KILL (securityContext: runAsUser 0, capabilities.add [KILL]), or set the Job's \
                 activeDeadlineSeconds",
            );
        }
    }
}

/// Processes of KAITO's containers in the namespace.
#[derive(Debug, Default, PartialEq)]
struct Neighbours {
    pusher: Vec<i32>,
    pause: Vec<i32>,
}

impl Neighbours {
    fn look() -> Neighbours {
        let list = processes(Path::new("/proc"));
        let own = own_session(&list, std::process::id() as i32);
        Neighbours::among(&list, own)
    }

    /// Finds them by their command lines. The pusher's command line holds its script, which contains the sentinel's
    /// path.
    fn among(list: &[Process], own_session: Option<i32>) -> Neighbours {
        let mut found = Neighbours::default();
        for process in list {
            if process.pid <= 1 || Some(process.session) == own_session {
                continue;
            }
            let script = process.arguments.get(1).is_some_and(|flag| flag == "-c");
            match process.arguments.as_slice() {
                [program, ..] if program == "/pause" => found.pause.push(process.pid),
                [.., text] if script && text.contains(SENTINEL) => found.pusher.push(process.pid),
                _ => {}
            }
        }
        found
    }
}

/// Returns whether the process namespace is the pod's. In that case our container's first process has a parent outside
/// of it and is not PID 1.
fn shared() -> bool {
    is_shared(&processes(Path::new("/proc")), std::process::id() as i32)
}

fn is_shared(list: &[Process], own: i32) -> bool {
    let mut pid = own;
    // LIMIT: no more ancestors than processes.
    for _ in 0..=list.len() {
        match list.iter().find(|process| process.pid == pid) {
            Some(process) if process.parent == 0 => return pid != 1,
            Some(process) => pid = process.parent,
            None => return false,
        }
    }
    false
}

fn own_session(list: &[Process], own: i32) -> Option<i32> {
    list.iter().find(|process| process.pid == own).map(|process| process.session)
}

#[derive(Clone, Debug, PartialEq)]
struct Process {
    pid: i32,
    /// The parent; 0 if it is outside of the namespace.
    parent: i32,
    session: i32,
    arguments: Vec<String>,
}

/// Returns all running processes. A process that ends while it is read is left out, and so are zombies, which have no
/// command line.
fn processes(proc: &Path) -> Vec<Process> {
    let entries = std::fs::read_dir(proc).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let (parent, session) =
                parent_and_session(&std::fs::read_to_string(entry.path().join("stat")).ok()?)?;
            let line = std::fs::read(entry.path().join("cmdline")).ok().filter(|line| !line.is_empty())?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let arguments = line.trim_end_matches('\0').split('\0').map(String::from).collect();
            Some(Process { pid, parent, session, arguments })
        })
        .collect()
}

/// Reads `pid (name) state parent group session ...`. The name may hold any character, so the fields are read behind
/// the last bracket.
fn parent_and_session(stat: &str) -> Option<(i32, i32)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    Some((parent, fields.nth(1)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32, arguments: &[&str]) -> Process {
        let arguments = arguments.iter().map(|&argument| argument.into()).collect();
        Process { pid, parent, session, arguments }
    }

    /// Returns a pod of KAITO's: its pause, our container's two processes, the pusher at work, the pause container.
    fn pod() -> Vec<Process> {
        let script = "SENTINEL_PATH='/mnt/results/fine_tuning_completed.txt'\nwhile ...";
        vec![
            process(1, 0, 1, &["/pause"]),
            process(7, 0, 7, &["/bin/sh", "-c", "echo fine_tuning_completed.txt; accelerate"]),
            process(8, 7, 7, &["accelerate", "launch", "fine_tuning.py"]),
            process(20, 0, 20, &["/bin/sh", "-c", script]),
            process(21, 20, 20, &["sleep", "1"]),
            process(30, 0, 30, &["/pause"]),
            process(40, 0, 40, &["cat", "/mnt/results/fine_tuning_completed.txt"]),
        ]
    }

    #[test]
    fn kaitos_containers_are_found_and_nothing_of_ours_nor_pid_1() {
        let list = pod();
        let own = own_session(&list, 8);
        assert_eq!(Neighbours::among(&list, own), Neighbours { pusher: vec![20], pause: vec![30] });
    }

    #[test]
    fn a_namespace_is_shared_if_ours_is_not_its_first() {
        assert!(is_shared(&pod(), 8));
        let alone = [process(1, 0, 1, &["/bin/sh"]), process(2, 1, 1, &["accelerate"])];
        assert!(!is_shared(&alone, 2) && !is_shared(&alone, 1));
    }

    #[test]
    fn names_with_brackets_do_not_shift_a_processs_fields() {
        assert_eq!(parent_and_session("9 (a) b) S 7 9 5 0 -1"), Some((7, 5)));
        let own = processes(Path::new("/proc")).into_iter().find(|one| one.pid == std::process::id() as i32);
        assert!(!own.expect("this process").arguments.is_empty());
    }

    #[test]
    fn limits_are_seconds() {
        let limits = |text: &'static str| Limits::read(&move |_| Some(text.into()));
        assert_eq!(limits("7").unwrap().hold, Duration::from_secs(7));
        assert!(limits("1h").unwrap_err().message.contains("HONE_KAITO_START: expected a number of seconds"));
    }
}

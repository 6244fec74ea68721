//! The real binary in a folder of its own. Nothing of this machine's environment reaches it, and paths are relative
//! to the folder, so that messages can be compared word by word.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// LIMIT: the slowest wait is for a job's first step, which takes well below a second on an idle machine.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// File names that mean that an adapter is ready.
pub const FINAL: [&str; 3] =
    ["adapter_config.json", "adapter_model.safetensors", "fine_tuning_completed.txt"];

pub struct Work {
    folder: tempfile::TempDir,
}

/// The end of a command and its output.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Work {
    pub fn new() -> Work {
        Work { folder: tempfile::tempdir().unwrap() }
    }

    /// Returns a folder with `model/` (the golden Llama) and `data.parquet` (conversations).
    pub fn with_llama() -> Work {
        let work = Work::new();
        work.copy("llama3/model", "model");
        work.copy("_data/messages.parquet", "data.parquet");
        work
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    pub fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Copies a file or a flat folder of `tests/golden`.
    pub fn copy(&self, golden: &str, name: &str) {
        let from = golden_path(golden);
        if from.is_file() {
            return self.write(name, std::fs::read(from).unwrap());
        }
        for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
            let name = format!("{name}/{}", entry.file_name().to_str().unwrap());
            self.write(&name, std::fs::read(entry.path()).unwrap());
        }
    }

    /// Returns files of a folder, in order; none if it does not exist.
    pub fn list(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Returns `hone` with these arguments, in this folder.
    pub fn hone(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.path("home")).env("HONE_TERMINATION_LOG", self.path("termination.json"));
        command.current_dir(self.folder.path()).args(arguments).stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        end(&mut self.hone(arguments))
    }

    /// Runs until success.
    pub fn done(&self, arguments: &[&str]) -> Ended {
        done(&mut self.hone(arguments))
    }

    /// Starts it and returns while it runs.
    pub fn start(&self, arguments: &[&str]) -> Running {
        self.start_command(&mut self.hone(arguments), "log")
    }

    /// Returns the same for a command with more settings; `log` receives its output.
    pub fn start_command(&self, command: &mut Command, log: &str) -> Running {
        let file = std::fs::File::create(self.path(log)).unwrap();
        let child = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Running { child, log: self.path(log) }
    }
}

pub fn golden_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn end(command: &mut Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

pub fn done(command: &mut Command) -> Ended {
    let ended = end(command);
    assert_eq!(ended.code, Some(0), "{command:?}\n{}{}", ended.stdout, ended.stderr);
    ended
}

/// A started `hone`. It is killed when this value is dropped.
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Its number.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: i32) {
        let process = i32::try_from(self.child.id()).unwrap();
        // SAFETY: this is a plain system call; the child has not been waited for, so its number is still its own.
        assert_eq!(unsafe { libc::kill(process, signal) }, 0);
    }

    /// Waits until a condition holds, while the process runs.
    pub fn until(&mut self, what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended before {what}: {status}\n{}", self.log());
            }
            assert!(start.elapsed() < WAIT_MAX, "no {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end. Returns the largest memory that it had, in KiB, as it was seen some milliseconds before.
    pub fn memory_peak(&mut self) -> u64 {
        let mut most = 0;
        while self.child.try_wait().unwrap().is_none() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
            let status = status.unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.trim().split(' ').next()?.parse().ok());
            most = kib.unwrap_or(0).max(most);
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    }

    /// Its exit code, `None` after a signal, and its log.
    pub fn end(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        (code, self.log())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

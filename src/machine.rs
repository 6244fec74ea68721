//! Memory of the machine: how much is left, how much this process used, and how the allocator keeps it; and the time
//! that a thread has used.

use std::path::Path;
use std::time::Duration;

/// Keeps freed memory in the process instead of giving it back to the kernel.
///
/// A training step frees and allocates the same activations again. With glibc's defaults, blocks above 32 MiB are
/// mapped again each time and the kernel clears every page, which takes a sixth of a step of an 88M model
/// (`benches/LOG.md`). Peak memory stays the same, because the activations of a step dominate it. Other C libraries
/// keep their own rules.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets numbers of the allocator; it is called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Returns the processor time of the calling thread so far. A machine that stalls adds nothing to it.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the structure that it is given, and nothing else.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Returns the number of bytes of memory that this process may still allocate: the machine's available memory, or less
/// if a container's limit is lower. Page cache counts as available, since the kernel frees it on demand. `None` if the
/// system does not say.
pub fn memory_available() -> Option<u64> {
    available_below(Path::new("/"))
}

/// Returns the largest resident set so far, in bytes, as the kernel counted it.
pub fn memory_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    number_after(&status, "VmHWM:").map(|kib| kib * 1024)
}

/// Returns the number of bytes of this process that are in memory now.
pub fn memory_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    number_after(&status, "VmRSS:").map(|kib| kib * 1024)
}

fn available_below(root: &Path) -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let machine =
        read("proc/meminfo").and_then(|text| number_after(&text, "MemAvailable:")).map(|kib| kib * 1024);
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let groups = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        match controllers {
            "" => Some((root.join("sys/fs/cgroup"), path, &SECOND)),
            _ if controllers.split(',').any(|name| name == "memory") => {
                Some((root.join("sys/fs/cgroup/memory"), path, &FIRST))
            }
            _ => None,
        }
    });
    // Any control group above the process may have a limit.
    let levels = groups.flat_map(|(mount, path, files)| {
        let path = Path::new(path.trim_start_matches('/'));
        path.ancestors().filter_map(|level| left(&mount.join(level), files)).collect::<Vec<_>>()
    });
    levels.chain(machine).min()
}

/// Names of a control group's files: limit, usage, statistics, and the statistics' lines of page cache.
struct Files {
    limit: &'static str,
    usage: &'static str,
    cache: [&'static str; 2],
}

const SECOND: Files =
    Files { limit: "memory.max", usage: "memory.current", cache: ["inactive_file", "active_file"] };
const FIRST: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};

fn left(group: &Path, files: &Files) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let limit: u64 = read(files.limit)?.trim().parse().ok()?; // "max" is no limit
    let usage: u64 = read(files.usage)?.trim().parse().ok()?;
    let statistics = read("memory.stat").unwrap_or_default();
    let cache: u64 = files.cache.iter().filter_map(|name| number_after(&statistics, name)).sum();
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

/// Returns the number in the line that begins with `word`.
fn number_after(text: &str, word: &str) -> Option<u64> {
    let mut words = text.lines().map(str::split_ascii_whitespace);
    words.find_map(|mut line| (line.next()? == word).then(|| line.next()?.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_takes_no_time() {
        let began = thread_time();
        std::thread::sleep(Duration::from_millis(100));
        assert!(thread_time() - began < Duration::from_millis(50));
        let mut sum = 0u64;
        while thread_time() - began < Duration::from_millis(60) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(sum > 0);
    }

    fn available(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        available_below(root.path())
    }

    #[test]
    fn the_nearest_limit_counts_and_page_cache_does_not() {
        let machine = ("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:  5000 kB\n");
        assert_eq!(available(&[machine]), Some(5000 << 10));
        assert_eq!(available(&[]), None);
        let second = [
            machine,
            ("proc/self/cgroup", "0::/pod/box\n"),
            ("sys/fs/cgroup/pod/memory.max", "3000000\n"),
            ("sys/fs/cgroup/pod/memory.current", "2500000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 1000000\nactive_file 500000\n"),
            ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/box/memory.current", "2500000\n"),
        ];
        assert_eq!(available(&second), Some(2_000_000));
        let first = [
            machine,
            ("proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/pod\n"),
            ("sys/fs/cgroup/memory/pod/memory.limit_in_bytes", "1000000\n"),
            ("sys/fs/cgroup/memory/pod/memory.usage_in_bytes", "400000\n"),
        ];
        assert_eq!(available(&first), Some(600_000));
    }
}

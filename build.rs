//! kernels/*.cu -> one fatbin each, for every architecture hone runs on, if the `cuda` feature is on; and the source
//! that makes tokens -> its digest, so that a program does not use tokens that another one made.

use std::env;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Machine code for Ampere (80), Hopper (90) and Blackwell (100, 120). Code for 8.0 runs on 8.6 and 8.9 (Ampere's other
/// cards and Ada) too: CUDA promises that within a major version. The list is in ascending order.
const ARCHITECTURES: &str = "80,90,100,120";

/// The first architecture whose kernels wait for the kernels before them (`wait_for_earlier_kernels` in
/// kernels/common.cuh). Kernels are compiled in two forms for this reason. The binary also holds the PTX of the second
/// form, for later architectures.
const WAITS_FROM: u32 = 90;

/// The end of the names of files for Hopper alone.
const HOPPER: &str = "_hopper";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=HONE_DATA_CODE={:016x}", digest_of_data_code());
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "NVCC_CCBIN", "HONE_CUDA_ARCHITECTURES", "HONE_CUDA_LINES"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = sources();
    // nvcc is single-threaded: one process a source, as many at once as cargo allows.
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).max(1);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile(source, &out);
                }
            });
        }
    });
    let mut list = String::from(
        "/// Name and machine code of each file of kernels.\npub static FATBINS: &[(&str, &[u8])] = &[\n",
    );
    for stem in sources.iter().map(|source| stem(source)) {
        let path = out.join(format!("{stem}.fatbin"));
        writeln!(list, "    ({stem:?}, include_bytes!({path:?})),").expect("writing to a text");
    }
    list.push_str("];\n");
    std::fs::write(out.join("fatbins.rs"), list).expect("cargo's output folder is writable");
}

/// Returns the digest of everything that decides which tokens a row becomes: the modules that read and encode, and
/// crate versions.
fn digest_of_data_code() -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in ["src/dataset", "src/bounds.rs", "src/words.rs", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={path}");
        hash(Path::new(path), &mut hasher);
    }
    hasher.finish()
}

fn hash(path: &Path, hasher: &mut DefaultHasher) {
    path.hash(hasher);
    match std::fs::read_dir(path) {
        Err(_) => std::fs::read(path).unwrap_or_default().hash(hasher),
        Ok(entries) => {
            let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            paths.sort();
            paths.iter().for_each(|path| hash(path, hasher));
        }
    }
}

fn sources() -> Vec<PathBuf> {
    let folder = std::fs::read_dir("kernels").expect("kernels/ is part of the repository");
    let mut sources: Vec<PathBuf> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    sources
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(|stem| stem.to_str()).expect("kernels have plain names")
}

fn compile(source: &Path, out: &Path) {
    let nvcc = match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(home)) => PathBuf::from(home).join("bin/nvcc"),
        (None, None) => "nvcc".into(),
    };
    let list = env::var("HONE_CUDA_ARCHITECTURES").unwrap_or_else(|_| ARCHITECTURES.into());
    let architectures: Vec<&str> = list.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    let mut command = Command::new(&nvcc);
    // Flags meant for candle's kernels are not for these.
    command.env_remove("NVCC_APPEND_FLAGS").env_remove("NVCC_PREPEND_FLAGS");
    command.args(["-O3", "-std=c++17", "--fatbin", "-t", "0", "--compress-mode=size", "-Xptxas=-v"]);
    // A profiler needs the lines; they double the size of the machine code.
    if env::var_os("HONE_CUDA_LINES").is_some_and(|value| value == "1") {
        command.arg("-lineinfo");
    }
    // One run of the compiler's front end serves all of a form: the PTX of the first is assembled for the others.
    if stem(source).ends_with(HOPPER) {
        // Its instructions exist on this architecture alone. An empty image says that the binary has none of them.
        if !architectures.contains(&"90") {
            for kind in ["fatbin", "ptxas"] {
                let path = out.join(format!("{}.{kind}", stem(source)));
                std::fs::write(path, "").expect("cargo's output folder is writable");
            }
            return;
        }
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
    } else {
        let waits = |architecture: &&str| architecture.parse().unwrap_or(0) >= WAITS_FROM;
        let (later, earlier): (Vec<&str>, Vec<&str>) = architectures.iter().partition(|a| waits(a));
        let forms = [earlier, later].into_iter().filter(|form| !form.is_empty());
        let mut forms = forms.peekable();
        while let Some(form) = forms.next() {
            let mut code: Vec<String> =
                form.iter().map(|architecture| format!("sm_{architecture}")).collect();
            if forms.peek().is_none() {
                code.push(format!("compute_{}", form[0]));
            }
            command.arg(format!("-gencode=arch=compute_{},code=[{}]", form[0], code.join(",")));
        }
    }
    if let Some(compiler) = env::var_os("NVCC_CCBIN").filter(|compiler| !compiler.is_empty()) {
        command.arg("-ccbin").arg(compiler);
    }
    // clippy, a release and a development build each have an output folder of their own, and share what is compiled.
    let shared = Shared::of(source, &command, out);
    if shared.bring(source, out) {
        return;
    }
    command.arg(source).arg("-o").arg(out.join(format!("{}.fatbin", stem(source))));
    let output = command.output().unwrap_or_else(|error| {
        panic!("cannot run {}: {error}; kernels/toolchain/install fetches nvcc", nvcc.display())
    });
    if !output.status.success() {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        panic!("nvcc failed on {}\n{}{}", source.display(), text(&output.stdout), text(&output.stderr));
    }
    // C7510 and later: products of warpgroups that wait for each other, because of how registers are used.
    let said = String::from_utf8_lossy(&output.stderr);
    if let Some(line) = said.lines().find(|line| line.contains("(C75")) {
        panic!("nvcc on {}: {line}", source.display());
    }
    // Registers and spills of every kernel: `tests/kernel_resources` reads them.
    let report = out.join(format!("{}.ptxas", stem(source)));
    std::fs::write(report, &output.stderr).expect("cargo's output folder is writable");
    shared.keep(source, out);
}

/// The results of one compilation, kept for all builds in `kernels` of cargo's target folder. Their names have a digest
/// of everything that they depend on.
struct Shared {
    folder: PathBuf,
    digest: u64,
}

impl Shared {
    const KINDS: [&str; 2] = ["fatbin", "ptxas"];

    fn of(source: &Path, command: &Command, out: &Path) -> Shared {
        let mut hasher = DefaultHasher::new();
        let version = Command::new(command.get_program()).arg("--version").output();
        version.map(|output| output.stdout).unwrap_or_default().hash(&mut hasher);
        command.get_program().hash(&mut hasher);
        command.get_args().for_each(|argument| argument.hash(&mut hasher));
        hash(source, &mut hasher);
        let folder = std::fs::read_dir("kernels").expect("kernels/ is part of the repository");
        let mut headers: Vec<PathBuf> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
        headers.retain(|path| path.extension().is_some_and(|extension| extension == "cuh"));
        headers.sort();
        headers.iter().for_each(|header| hash(header, &mut hasher));
        // target/PROFILE/build/hone-HASH/out
        let target = out.ancestors().nth(4).unwrap_or(out);
        Shared { folder: target.join("kernels"), digest: hasher.finish() }
    }

    fn path(&self, source: &Path, kind: &str) -> PathBuf {
        self.folder.join(format!("{}-{:016x}.{kind}", stem(source), self.digest))
    }

    /// Copies the results of an earlier compilation. Returns whether all were there.
    fn bring(&self, source: &Path, out: &Path) -> bool {
        let copy = |kind: &str| {
            std::fs::copy(self.path(source, kind), out.join(format!("{}.{kind}", stem(source)))).is_ok()
        };
        Shared::KINDS.into_iter().all(copy)
    }

    /// Keeps the results for other builds, which find whole files only. If that fails, they compile for themselves.
    fn keep(&self, source: &Path, out: &Path) {
        let keep = |kind: &str| {
            let unfinished = self.path(source, &format!("{kind}.{}", std::process::id()));
            std::fs::copy(out.join(format!("{}.{kind}", stem(source))), &unfinished)?;
            std::fs::rename(unfinished, self.path(source, kind))
        };
        let _ =
            std::fs::create_dir_all(&self.folder).and_then(|()| Shared::KINDS.into_iter().try_for_each(keep));
    }
}

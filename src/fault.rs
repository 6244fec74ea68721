//! Every error of hone is a `Fault`: a message with its kind, which says who must act and sets the exit code.
//!
//! The exit code tells Kubernetes whether a retry can help (`podFailurePolicy`), so a kind is chosen by
//! *who must act*, not by where the error was found. Messages name the thing, the value found and the
//! value expected; `help` says what to do. Neither ever holds a secret: URLs are shown without their query.

use std::fmt;

/// The party that must act. The discriminant is the process exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The command line is wrong.
    Usage = 2,
    /// The configuration is invalid or contradictory.
    Config = 10,
    /// The dataset is malformed, empty, or not what was declared.
    Data = 11,
    /// The model is unsupported, incomplete or damaged.
    Model = 12,
    /// Credentials are missing or refused (401, 403).
    Auth = 13,
    /// The job needs more memory or disk than there is.
    Capacity = 14,
    /// Training produced NaN or infinity, a spike, or an adapter without effect.
    Diverged = 15,
    /// A server or registry could not be reached after all retries.
    Network = 20,
    /// The disk is full or failing, or another hone uses the folder.
    Storage = 21,
    /// An accelerator failed, ranks failed or do not agree, or threads or open files ran out.
    Device = 22,
    /// Training is done and safe on disk, but the push failed.
    Push = 23,
    /// A signal stopped the run; a checkpoint was written.
    Interrupted = 30,
    /// A signal stopped the run before anything could be saved.
    InterruptedUnsaved = 31,
    /// hone has a defect; please report it.
    Internal = 70,
}

impl Kind {
    /// Every kind, in order of exit code. docs/exit-codes.md is tested against this list.
    pub const ALL: [Kind; 14] = [
        Kind::Usage,
        Kind::Config,
        Kind::Data,
        Kind::Model,
        Kind::Auth,
        Kind::Capacity,
        Kind::Diverged,
        Kind::Network,
        Kind::Storage,
        Kind::Device,
        Kind::Push,
        Kind::Interrupted,
        Kind::InterruptedUnsaved,
        Kind::Internal,
    ];

    /// Returns the exit code of a process that ends with a fault of this kind.
    pub fn exit_code(self) -> u8 {
        self as u8
    }

    /// Returns the stable machine name, used in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Config => "config",
            Kind::Data => "data",
            Kind::Model => "model",
            Kind::Auth => "auth",
            Kind::Capacity => "capacity",
            Kind::Diverged => "diverged",
            Kind::Network => "network",
            Kind::Storage => "storage",
            Kind::Device => "device",
            Kind::Push => "push",
            Kind::Interrupted => "interrupted",
            Kind::InterruptedUnsaved => "interrupted-unsaved",
            Kind::Internal => "internal",
        }
    }

    /// Returns the description of the kind, in a sentence; docs/exit-codes.md holds it.
    pub fn meaning(self) -> &'static str {
        match self {
            Kind::Usage => "The command line is wrong.",
            Kind::Config => "The configuration is invalid or contradictory.",
            Kind::Data => "The dataset is malformed, empty, or not what was declared.",
            Kind::Model => "The model is unsupported, incomplete or damaged.",
            Kind::Auth => "Credentials are missing or refused (401, 403).",
            Kind::Capacity => "The job needs more memory or disk than there is.",
            Kind::Diverged => "Training produced NaN or infinity, a spike, or an adapter without effect.",
            Kind::Network => "A server or registry could not be reached after all retries.",
            Kind::Storage => "The disk is full or failing, or another hone uses the folder.",
            Kind::Device => {
                "An accelerator failed, ranks failed or do not agree, or threads or open files ran out."
            }
            Kind::Push => "Training is done and safe on disk, but the push failed.",
            Kind::Interrupted => "A signal stopped the run; a checkpoint was written.",
            Kind::InterruptedUnsaved => "A signal stopped the run before anything could be saved.",
            Kind::Internal => "hone has a defect; please report it.",
        }
    }

    /// Returns whether the same command can succeed if it runs again and nobody changes anything.
    pub fn retry_helps(self) -> bool {
        matches!(
            self,
            Kind::Network
                | Kind::Storage
                | Kind::Device
                | Kind::Push
                | Kind::Interrupted
                | Kind::InterruptedUnsaved
        )
    }
}

/// Returns the table of exit codes in Markdown; docs/exit-codes.md holds it.
pub fn markdown() -> String {
    let row = |kind: &Kind| {
        let retry = if kind.retry_helps() { "yes" } else { "no" };
        format!("| {} | `{}` | {} | {retry} |\n", kind.exit_code(), kind.name(), kind.meaning())
    };
    let head = "| code | name | meaning | retry helps |\n|---|---|---|---|\n";
    Kind::ALL.iter().fold(head.to_owned(), |table, kind| table + &row(kind))
}

/// An error: its kind, one sentence about the event, and the remedy.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The party that must act; the kind sets the exit code.
    pub kind: Kind,
    /// The description: the thing, the value found and the value expected.
    pub message: String,
    /// The remedy.
    pub help: Option<String>,
}

/// The result of a function that can fail with a `Fault`.
pub type Result<T> = std::result::Result<T, Fault>;

impl Fault {
    /// Returns a fault of this kind, without help.
    pub fn new(kind: Kind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into(), help: None }
    }

    /// Adds what the reader should do; it is shown on a line of its own.
    pub fn help(mut self, help: impl Into<String>) -> Fault {
        self.help = Some(help.into());
        self
    }

    /// Puts the place in front of the message: `file.parquet: row group 3: ...`.
    pub fn at(mut self, place: impl fmt::Display) -> Fault {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// Returns the message and the help in one line, for a fault that is shown in a list with others.
    pub fn in_a_line(self) -> String {
        match self.help {
            Some(help) => format!("{}; {help}", self.message),
            None => self.message,
        }
    }

    /// Returns a fault of kind [`Kind::Usage`].
    pub fn usage(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Usage, message)
    }
    /// Returns a fault of kind [`Kind::Config`].
    pub fn config(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Config, message)
    }
    /// Returns a fault of kind [`Kind::Data`].
    pub fn data(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Data, message)
    }
    /// Returns a fault of kind [`Kind::Model`].
    pub fn model(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Model, message)
    }
    /// Returns a fault of kind [`Kind::Auth`].
    pub fn auth(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Auth, message)
    }
    /// Returns a fault of kind [`Kind::Capacity`].
    pub fn capacity(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Capacity, message)
    }
    /// Returns a fault of kind [`Kind::Network`].
    pub fn network(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Network, message)
    }
    /// Returns a fault of kind [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Internal, message)
    }

    /// Returns the fault for a thread, a process or a runtime that cannot be started. A machine without free threads,
    /// memory or open files is [`Kind::Device`], for which a retry may help; anything else is a defect.
    pub fn machine(doing: &str, error: &dyn fmt::Display) -> Fault {
        let message = format!("cannot {doing}: {error}");
        let number = error_number(&message);
        Fault::exhausted(&message, number).unwrap_or_else(|| Fault::internal(message))
    }

    /// Returns the fault for a panic. Libraries panic if the machine gives them no thread or no open file; any other
    /// panic is a defect. EAGAIN alone proves nothing, since sockets answer it too.
    pub fn of_panic(panic: &(dyn std::any::Any + Send)) -> Fault {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or_default();
        let debugged =
            text.rsplit_once("Os { code: ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        let number = debugged.or_else(|| error_number(text));
        let is_passing = |number: &i32| *number == libc::EMFILE || text.contains("thread");
        Fault::exhausted(text, number.filter(is_passing))
            .unwrap_or_else(|| Fault::internal("hone failed: see the panic message above"))
    }

    fn exhausted(message: &str, number: Option<i32>) -> Option<Fault> {
        let help = match number? {
            libc::EMFILE | libc::ENFILE => "raise the limit of open files (ulimit -n)",
            libc::EAGAIN | libc::ENOMEM => {
                "raise the limits of processes and memory (ulimit -u, the pod's limits)"
            }
            _ => return None,
        };
        Some(
            Fault::new(Kind::Device, message)
                .help(format!("{help}, or try again when the machine has some left")),
        )
    }

    /// Returns the fault for an I/O error on a file that somebody gave: of `kind` if the file is missing or may not be
    /// read; [`Kind::Storage`] if the machine failed to read it, for which a retry may help.
    pub fn unread(kind: Kind, message: impl Into<String>, error: &std::io::Error) -> Fault {
        use std::io::ErrorKind as E;
        let fault = Fault::new(if is_machines(error) { Kind::Storage } else { kind }, message);
        match error.kind() {
            E::NotFound => {
                fault.help("check the path and, in a container, the mount; a link must lead to a file")
            }
            E::PermissionDenied => fault.help("give this user the right to read it"),
            E::IsADirectory => fault.help("name a file, not its folder"),
            E::InvalidInput if error.raw_os_error().is_none() => {
                fault.help("give a plain file, or a link to one")
            }
            _ => fault,
        }
    }

    /// Returns this fault, or one of [`Kind::Storage`] if its message says that the operating system could not read a
    /// file. Parsers of other crates return the system's errors as text.
    pub fn or_machines(mut self) -> Fault {
        if ends_with_os_error(&self.message) {
            (self.kind, self.help) = (Kind::Storage, None);
        }
        self
    }

    /// Returns the fault for an I/O error on a path that hone reads or writes. A full or failing disk is
    /// [`Kind::Storage`], for which a retry may help. A path that cannot be used as it is (permissions, the wrong type)
    /// is [`Kind::Config`], for which no retry helps.
    pub fn storage(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Fault {
        use std::io::ErrorKind as E;
        let message = format!("cannot {doing} {}: {error}", path.display());
        match error.kind() {
            E::PermissionDenied
            | E::NotADirectory
            | E::IsADirectory
            | E::AlreadyExists
            | E::ReadOnlyFilesystem => Fault::config(message)
                .help("name a folder that this user may write, or change its permissions"),
            E::InvalidInput if error.raw_os_error().is_none() => {
                Fault::config(message).help("give a plain file, or a link to one")
            }
            E::StorageFull | E::QuotaExceeded => Fault::new(Kind::Storage, message)
                .help("free some space, then start it again: finished files are kept"),
            _ => Fault::new(Kind::Storage, message),
        }
    }
}

/// Returns whether an I/O error is the machine's: a failing disk, a lost network file system, no more open files. It
/// passes by itself. A person must repair a missing file, a file that may not be read, and a file that ends too early.
fn is_machines(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as E;
    let somebodys = [
        E::NotFound,
        E::PermissionDenied,
        E::NotADirectory,
        E::IsADirectory,
        E::InvalidInput,
        E::InvalidFilename,
        E::UnexpectedEof,
    ];
    // A link that leads to itself has no kind of its own.
    let is_loop = error.raw_os_error() == Some(libc::ELOOP);
    error.raw_os_error().is_some() && !is_loop && !somebodys.contains(&error.kind())
}

/// Returns whether a parser's message ends with an error of the operating system, as `io::Error` writes it.
fn ends_with_os_error(message: &str) -> bool {
    error_number(message).is_some_and(|number| is_machines(&std::io::Error::from_raw_os_error(number)))
}

/// Returns the number of the operating system's error that a message ends with.
fn error_number(message: &str) -> Option<i32> {
    let (_, number) = message.trim_end().strip_suffix(')')?.rsplit_once("(os error ")?;
    number.parse().ok()
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Fault {}

/// Tensor code fails for two reasons. Either hone has a defect, since shapes and types were checked when the model
/// was read. Or the GPU's memory is full or the GPU itself fails, which may not happen on another GPU.
impl From<candle_core::Error> for Fault {
    fn from(error: candle_core::Error) -> Fault {
        let text = format!("{error:?}");
        let said = |words: &[&str]| words.iter().any(|word| text.contains(word));
        // These answers of the driver mean a wrong call by hone, not a failed device.
        let ours = ["INVALID_VALUE", "INVALID_HANDLE", "NOT_FOUND", "INVALID_CONTEXT"];
        if said(&["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"]) {
            return Fault::capacity(format!("the GPU's memory is full: {error}"))
                .help("lower TrainingArguments.max_length, or take a GPU with more memory");
        }
        if said(&["CUDA_ERROR_", "CUBLAS_STATUS_"]) && !said(&ours) {
            return Fault::new(Kind::Device, format!("the GPU failed: {error}"))
                .help("start it again: it continues from its newest checkpoint; if it fails twice on the same node, look at nvidia-smi");
        }
        Fault::internal(format!("tensor operation failed: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpus_failure_is_told_from_a_defect() {
        let kind = |text: &str| Fault::from(candle_core::Error::Msg(text.into())).kind;
        assert_eq!(kind("DriverError(CUDA_ERROR_OUT_OF_MEMORY, ..)"), Kind::Capacity);
        assert_eq!(kind("DriverError(CUDA_ERROR_ECC_UNCORRECTABLE, ..)"), Kind::Device);
        assert_eq!(kind("product 2 x 3: CUBLAS_STATUS_EXECUTION_FAILED"), Kind::Device);
        assert_eq!(kind("DriverError(CUDA_ERROR_NOT_FOUND, ..)"), Kind::Internal);
        assert_eq!(kind("shape mismatch"), Kind::Internal);
    }

    #[test]
    fn a_machine_that_cannot_read_is_no_fault_of_the_file() {
        let kind = |number| {
            let error = std::io::Error::from_raw_os_error(number);
            let told = Fault::data(format!("a.parquet: External: {error}")).or_machines().kind;
            assert_eq!(told, Fault::unread(Kind::Data, "a", &error).kind, "{error}");
            told
        };
        for passing in [libc::EIO, libc::ESTALE, libc::ETIMEDOUT, libc::EMFILE, libc::ENOMEM] {
            assert_eq!(kind(passing), Kind::Storage);
        }
        for lasting in
            [libc::ENOENT, libc::EACCES, libc::EISDIR, libc::ENOTDIR, libc::ELOOP, libc::ENAMETOOLONG]
        {
            assert_eq!(kind(lasting), Kind::Data);
        }
        let made_up = std::io::Error::other("not a plain file");
        assert_eq!(Fault::unread(Kind::Model, "a", &made_up).kind, Kind::Model);
        for somebodys in [libc::ENOENT, libc::EACCES, libc::EISDIR] {
            let fault = Fault::unread(Kind::Data, "a", &std::io::Error::from_raw_os_error(somebodys));
            assert!(fault.help.is_some(), "{somebodys}");
        }
        for text in ["", ")", "(os error )", "(os error x)", "a column `(os error 5)` is missing"] {
            assert_eq!(Fault::data(text).or_machines().kind, Kind::Data, "{text}");
        }
    }

    #[test]
    fn a_machine_without_threads_or_open_files_is_no_defect() {
        let of = |number| Fault::machine("start a thread", &std::io::Error::from_raw_os_error(number));
        for passing in [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ENOMEM] {
            assert_eq!(of(passing).kind, Kind::Device, "{passing}");
        }
        assert!(of(libc::EMFILE).help.unwrap().contains("ulimit -n"));
        assert_eq!(of(libc::EINVAL).kind, Kind::Internal);
        let pool = "The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError(Os { code: 11, \
                    kind: WouldBlock, message: \"Resource temporarily unavailable\" }) }";
        let tokio = "OS can't spawn worker thread: Resource temporarily unavailable (os error 11)";
        for text in [pool, tokio] {
            assert_eq!(Fault::of_panic(&text.to_owned()).kind, Kind::Device, "{text}");
        }
        let socket =
            "unwrap on Os { code: 11, kind: WouldBlock, message: \"Resource temporarily unavailable\" }";
        for text in
            ["index out of bounds", "Os { code: ", "no thread: Os { code: 2, kind: NotFound }", socket]
        {
            assert_eq!(Fault::of_panic(&text).kind, Kind::Internal, "{text}");
        }
    }

    #[test]
    fn codes_are_distinct_and_avoid_what_shells_and_kubelet_use() {
        let mut codes: Vec<u8> = Kind::ALL.iter().map(|kind| kind.exit_code()).collect();
        codes.dedup();
        assert_eq!(codes.len(), Kind::ALL.len());
        assert!(codes.iter().all(|&code| code > 1 && code < 126));
    }

    #[test]
    fn a_fault_reads_as_place_message_help() {
        let fault = Fault::data("0 rows").help("check the export").at("a.parquet");
        assert_eq!(fault.to_string(), "a.parquet: 0 rows\n  help: check the export");
    }
}

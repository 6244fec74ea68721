//! SIGTERM and SIGINT -> one flag that every long loop looks at; a second signal ends the process at once.
//!
//! Kubernetes sends SIGTERM, waits for the grace period and kills. The flag is looked at between batches of
//! rows, layers and micro-batches, and while the network is waited for, so that the time to a checkpoint is one
//! micro-batch, not one epoch.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::fault::{Fault, Kind, Result};

/// How often a wait for the network looks at the flag.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

fn flag() -> &'static Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    FLAG.get_or_init(Arc::default)
}

/// Starts listening. Call once, early in `main`.
pub fn listen() -> Result<()> {
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        let code = Kind::InterruptedUnsaved.exit_code().into();
        // Order matters: the shutdown acts only if the flag was already set by an earlier signal.
        signal_hook::flag::register_conditional_shutdown(signal, code, flag().clone())
            .and_then(|_| signal_hook::flag::register(signal, flag().clone()))
            .map_err(|error| Fault::internal(format!("cannot listen for signal {signal}: {error}")))?;
    }
    Ok(())
}

/// Whether a signal asked the run to end.
pub fn requested() -> bool {
    flag().load(Ordering::Relaxed)
}

/// A fault if a signal asked the run to end; for loops with nothing of their own to save.
pub fn check() -> Result<()> {
    match requested() {
        false => Ok(()),
        true => Err(before_training()),
    }
}

/// Nothing is lost but time.
pub fn before_training() -> Fault {
    Fault::new(Kind::InterruptedUnsaved, "stopped by a signal before training began")
        .help("start it again: what was downloaded is kept")
}

/// What `work` gives, unless a signal comes first: then it is dropped where it stands and `stopped` is the answer.
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

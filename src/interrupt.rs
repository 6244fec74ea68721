//! SIGTERM and SIGINT -> one flag that every long loop looks at; a second signal ends the process at once.
//!
//! Kubernetes sends SIGTERM, waits for the grace period and kills. The flag is looked at between downloads,
//! files, layers and micro-batches, so that the time to a checkpoint is one micro-batch, not one epoch.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::fault::{Fault, Kind, Result};

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
        true => Err(Fault::new(Kind::InterruptedUnsaved, "stopped by a signal before training began")
            .help("start it again: finished downloads are kept")),
    }
}

//! Every end of the job in a pod of KAITO's -> the end of the pod's other containers.

use super::sidecars::{self, Limits};
use crate::fault::{Fault, Result};
use crate::report::{Report, Stage, termination};
use crate::spec::Environment;

/// Reports a fault from before the job began, writes the termination message and ends the other containers.
pub fn refuse(fault: &Fault, environment: Environment, report: &Report) {
    report.fault(fault);
    termination::leave(fault);
    release(environment, report);
}

/// Waits for KAITO's push of a job that succeeded, and ends the other containers of one that failed.
///
/// # Errors
/// The job's own fault, and those of [`sidecars::pushed`].
pub fn leave<T>(ended: Result<T>, environment: Environment, report: &Report) -> Result<T> {
    match ended {
        Ok(done) => sidecars::pushed(limits(environment), report).map(|()| done),
        Err(fault) => {
            release(environment, report);
            Err(fault)
        }
    }
}

/// Ends the other containers, which wait for the job.
pub fn release(environment: Environment, report: &Report) {
    sidecars::end(limits(environment), report);
}

/// Warns about a time limit that cannot be read.
pub fn warn_of_limits(environment: Environment, report: &Report) {
    if let Err(fault) = Limits::read(environment) {
        report.warn(Stage::Plan, fault.message);
    }
}

/// Returns the time limits. A limit that cannot be read takes its default, because the job has ended by now and its pod
/// must end too.
pub fn limits(environment: Environment) -> Limits {
    Limits::read(environment).or_else(|_| Limits::read(&|_| None)).expect("defaults are numbers")
}

//! A plan -> a run as `hone run` starts it: the plan's warnings first, then the job, followed by its trackers.

use crate::fault::Result;
use crate::plan::Plan;
use crate::report::{Report, Stage};
use crate::run_folder;
use crate::spec::Environment;
use crate::trackers::{End, Trackers};

use super::together::Together;
use super::{Receipt, run};

/// Takes this process's place among the ranks, reports what of the plan has no effect or is doubtful, and runs it with
/// its trackers. The environment holds the place and the trackers' secrets. The receipt is rank 0's.
///
/// # Errors
/// The faults of `job::run`, and Config: a tracker's address or secret cannot be used.
pub fn start(plan: &Plan, environment: Environment, report: &Report) -> Result<Option<Receipt>> {
    let together = Together::join(environment)?;
    together.leave(reported(plan, &together, environment, report))
}

/// Runs the job in this process. Only rank 0 has trackers.
fn reported(
    plan: &Plan,
    together: &Together,
    environment: Environment,
    report: &Report,
) -> Result<Option<Receipt>> {
    for ignored in &plan.ignored {
        report.note(Stage::Plan, format!("{} has no effect: {}", ignored.name, ignored.why));
    }
    for warning in &plan.warnings {
        report.warn(Stage::Plan, warning.as_str());
    }
    let options = plan.trackers.clone().with_secrets(environment);
    if options.is_empty() || !together.place().leads() {
        return run(plan, together, report);
    }
    let trackers = Trackers::start(&options, plan.settings(), report)?;
    let ended = together.leave(run(plan, together, &Report::new(trackers.clone())));
    // The page of a failed run is written when its failure is reported, which is later.
    let page = plan.output.join(run_folder::REPORT);
    trackers.finish(&End {
        failed: ended.is_err(),
        report: Some(page).filter(|page| ended.is_ok() && page.exists()),
    });
    ended
}

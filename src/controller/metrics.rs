//! The controller's counts -> Prometheus' text.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::workspace::Workspace;

/// The states of Workspaces that tune, then those that only serving ones have.
const STATES: [&str; 6] = ["Pending", "Running", "Succeeded", "Failed", "Ready", "NotReady"];

/// Counts of one controller process, updated by all reconciliations.
#[derive(Debug, Default)]
pub struct Metrics {
    reconciles: AtomicU64,
    errors: AtomicU64,
    /// Seconds of all reconciliations together.
    microseconds: AtomicU64,
    leads: AtomicBool,
    states: Mutex<HashMap<(String, String), &'static str>>,
}

impl Metrics {
    /// Returns the beginning of a reconciliation, for [`Metrics::ended`].
    pub fn started(&self) -> Instant {
        Instant::now()
    }

    /// Counts a reconciliation and its time. `well`: whether it ended without an error.
    pub fn ended(&self, started: Instant, well: bool) {
        self.reconciles.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(u64::from(!well), Ordering::Relaxed);
        self.microseconds.fetch_add(started.elapsed().as_micros() as u64, Ordering::Relaxed);
    }

    /// Sets whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.leads.store(leads, Ordering::Relaxed);
    }

    /// Counts a Workspace under a state of [`STATES`]; another state counts as none.
    pub fn saw(&self, workspace: &Workspace, state: &str) {
        match STATES.into_iter().find(|known| *known == state) {
            Some(known) => _ = self.states().insert(key(workspace), known),
            None => self.forget(workspace),
        }
    }

    /// Leaves out a Workspace that no longer exists.
    pub fn forget(&self, workspace: &Workspace) {
        self.states().remove(&key(workspace));
    }

    fn states(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), &'static str>> {
        self.states.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Returns all metrics in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
            _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let one = |value: f64| vec![(String::new(), value)];
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        family("hone_reconciles_total", "counter", "Workspaces looked at.", &one(number(&self.reconciles)));
        family(
            "hone_reconcile_errors_total",
            "counter",
            "Reconciliations that failed and are tried again.",
            &one(number(&self.errors)),
        );
        let seconds = number(&self.microseconds) / 1e6;
        family("hone_reconcile_seconds_total", "counter", "Time that looking took.", &one(seconds));
        let leads = if self.leads.load(Ordering::Relaxed) { 1.0 } else { 0.0 };
        family("hone_leader", "gauge", "Whether this process leads.", &one(leads));
        let states = self.states();
        let count = |state| states.values().filter(|other| **other == state).count() as f64;
        let samples = STATES.map(|state| (format!("{{state=\"{state}\"}}"), count(state)));
        family("hone_workspaces", "gauge", "Workspaces by state.", &samples);
        text
    }
}

fn key(workspace: &Workspace) -> (String, String) {
    (workspace.namespace().to_owned(), workspace.name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn text() {
        let metrics = Metrics::default();
        metrics.saw(&Workspace::default(), "Pending");
        metrics.saw(&Workspace::default(), "Running");
        metrics.leads(true);
        expect![[r#"
            # HELP hone_reconciles_total Workspaces looked at.
            # TYPE hone_reconciles_total counter
            hone_reconciles_total 0
            # HELP hone_reconcile_errors_total Reconciliations that failed and are tried again.
            # TYPE hone_reconcile_errors_total counter
            hone_reconcile_errors_total 0
            # HELP hone_reconcile_seconds_total Time that looking took.
            # TYPE hone_reconcile_seconds_total counter
            hone_reconcile_seconds_total 0
            # HELP hone_leader Whether this process leads.
            # TYPE hone_leader gauge
            hone_leader 1
            # HELP hone_workspaces Workspaces by state.
            # TYPE hone_workspaces gauge
            hone_workspaces{state="Pending"} 0
            hone_workspaces{state="Running"} 1
            hone_workspaces{state="Succeeded"} 0
            hone_workspaces{state="Failed"} 0
            hone_workspaces{state="Ready"} 0
            hone_workspaces{state="NotReady"} 0
        "#]]
        .assert_eq(&metrics.text());
    }
}

//! The phases of a server (loading, ready, ending), and the signal of the end to its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::model::Model;

/// The state of the server.
#[derive(Clone)]
pub enum Phase {
    /// The model is not there yet.
    Loading,
    /// Requests are answered.
    Ready(Arc<Model>),
    /// New requests are refused; running ones continue.
    Draining(Option<Arc<Model>>),
    /// Running requests end now.
    Stopped,
}

/// The state of one server; every connection has a copy.
#[derive(Clone)]
pub struct State {
    phase: Arc<watch::Sender<Phase>>,
    running: Arc<AtomicUsize>,
}

impl Default for State {
    fn default() -> State {
        State { phase: Arc::new(watch::Sender::new(Phase::Loading)), running: Arc::default() }
    }
}

/// Counts an answer while it is being given.
pub struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The signal that an answer must end.
#[derive(Clone)]
pub struct Stop {
    phase: watch::Receiver<Phase>,
    _running: Arc<Running>,
}

impl Stop {
    /// Waits for the end.
    pub async fn reached(&self) {
        let mut phase = self.phase.clone();
        let _ended = phase.wait_for(|phase| matches!(phase, Phase::Stopped)).await.is_ok();
    }
}

impl State {
    /// Returns the present phase.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Returns whether new requests are refused because the server ends.
    pub fn ends(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Draining(_) | Phase::Stopped)
    }

    /// Waits until running answers must end.
    pub async fn stopped(&self) {
        let mut phase = self.phase.subscribe();
        let _ended = phase.wait_for(|phase| matches!(phase, Phase::Stopped)).await.is_ok();
    }

    /// Sets the model as ready; without effect once the server ends.
    pub fn ready(&self, model: Arc<Model>) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Loading => {
                *phase = Phase::Ready(model);
                true
            }
            _ => false,
        });
    }

    /// Counts an answer that begins.
    pub fn begin(&self) -> Stop {
        self.running.fetch_add(1, Ordering::AcqRel);
        Stop { phase: self.phase.subscribe(), _running: Arc::new(Running(self.running.clone())) }
    }

    /// Returns the number of running answers.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    /// Refuses new requests, and waits for the running ones for at most `grace`; then ends them.
    pub async fn drain(&self, grace: Duration) {
        self.phase.send_modify(|phase| {
            let model = if let Phase::Ready(model) = phase { Some(model.clone()) } else { None };
            *phase = Phase::Draining(model);
        });
        let end = tokio::time::Instant::now() + grace;
        while self.running() > 0 && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.phase.send_replace(Phase::Stopped);
        // The answers say why they end.
        let end = tokio::time::Instant::now() + Duration::from_secs(1);
        while self.running() > 0 && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

//! Examples -> optimizer steps: loss, gradient, clipping, AdamW, schedule, evaluation, checkpoints.

pub mod best;
pub mod checkpoint;
mod deal;
mod evaluation;
mod health;
mod metric;
pub mod moments;
mod options;
pub mod order;
mod passes;
mod pieces;
pub mod schedule;
mod sets;
pub mod spike;
mod together;
mod trained;
mod trainer;
mod update;

pub use checkpoint::Checkpoints;
pub use evaluation::{evaluate, evaluate_together};
pub use metric::{Metric, Named};
pub use options::{Every, Options};
pub use passes::Passes;
pub use schedule::{Schedule, Warmup};
pub use sets::{Data, Sets, Source};
pub use trained::{BestEvaluation, Trained};
pub use trainer::{run, run_together};

#[cfg(test)]
mod rank_tests;
#[cfg(test)]
mod tests;

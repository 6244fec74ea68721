//! Examples -> optimizer steps: loss, gradient, clipping, AdamW, schedule, evaluation, checkpoints.

pub mod best;
pub mod checkpoint;
mod evaluation;
mod health;
mod metric;
pub mod moments;
mod options;
pub mod order;
mod passes;
pub mod schedule;
mod sets;
pub mod spike;
mod trained;
mod trainer;
mod update;

pub use checkpoint::Checkpoints;
pub use evaluation::evaluate;
pub use metric::{Metric, Named};
pub use options::{Every, Options, Warmup};
pub use passes::Passes;
pub use schedule::Schedule;
pub use sets::{Data, Sets, Source};
pub use trained::{BestEvaluation, Trained};
pub use trainer::run;

#[cfg(test)]
mod tests;

//! A Workspace that tunes -> the objects that do it, or why that cannot be. Pure: asks no cluster and no network.
//!
//! `kind` is what users write, `validate` KAITO's rules and ours, `annotations` what can be said beside it, `render` the Job.
//! `hone render` prints what `hone controller` applies.

pub mod crd;
pub mod kind;

//! Requests -> tokens, one after another: the requests to an engine, the choice of a token, and the text of tokens.
//! This module knows no HTTP.

pub mod defaults;
pub mod engine;
pub mod request;
pub mod sampling;
pub mod text;

pub use request::{
    Adapter, Answer, Counters, Engine, Event, Facts, Finish, Refusal, Request, Sampling, Scored, Sender,
    Shared, Strength, Usage, answer,
};

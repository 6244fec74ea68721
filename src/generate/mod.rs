//! Requests -> tokens, one after another: what an engine is asked, how a token is drawn, how tokens become text.
//! Knows no HTTP.

pub mod defaults;
pub mod engine;
pub mod request;
pub mod sampling;
pub mod text;

pub use request::{
    Adapter, Answer, Counters, Engine, Event, Facts, Finish, Refusal, Request, Sampling, Scored, Sender,
    Shared, Strength, Usage, answer,
};

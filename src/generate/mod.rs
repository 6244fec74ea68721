//! Requests -> tokens, one after another: what an engine is asked, how a token is drawn, how tokens become text.
//! Knows no HTTP.

pub mod request;

pub use request::{
    Adapter, Answer, Counters, Engine, Event, Facts, Finish, Refusal, Request, Sampling, Scored, Sender,
    Strength, Usage, answer,
};

//! hone fine-tunes a language model with QLoRA and ships the adapter.
//!
//! The list below is the table of contents, the data flow and the dependency order at once: a module uses
//! only modules above it (a test holds this). `job` is the whole run on one page.

#![warn(missing_docs)]

pub mod words;
pub mod fault;
pub mod whole;
pub mod plain;
pub mod backoff;
pub mod report;
pub mod last_word;
pub mod bounds;
pub mod interrupt;
pub mod endpoint;
pub mod machine;
pub mod metrics;
pub mod source;
pub mod dataset;
pub mod facts;
pub mod ops;
pub mod device;
pub mod ranks;
pub mod model;
pub mod memory;
pub mod train;
pub mod adapter;
pub mod generate;
pub mod answers;
pub mod export;
pub mod server;
pub mod registry;
pub mod fetch;
pub mod publish;
pub mod spec;
pub mod run_folder;
pub mod trackers;
pub mod plan;
pub mod run_report;
pub mod inspect;
pub mod job;
pub mod serving;
pub mod tuned;
pub mod evaluate;
pub mod trial;
pub mod merge;
pub mod review;
pub mod workspace;
pub mod controller;
pub mod kaito;
pub mod example;
pub mod bench;
pub mod cli;
pub mod commands;

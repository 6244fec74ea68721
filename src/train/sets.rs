//! Examples in memory or in a store -> those to train on, and those to score by source.

use crate::dataset::{Example, Examples};

/// Examples to train on, and examples to evaluate on.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Examples to train on.
    pub train: &'a [Example],
    /// Examples to evaluate on; may be empty.
    pub evaluation: &'a [Example],
}

/// Examples, wherever they are.
#[derive(Clone)]
pub struct Sets<'a> {
    /// Examples to train on.
    pub train: Examples<'a>,
    /// Examples to score, by source.
    pub evaluation: Vec<Source<'a>>,
}

/// Examples to score that come from one entry of the data.
#[derive(Clone)]
pub struct Source<'a> {
    /// The entry.
    pub entry: usize,
    /// The source's name in metrics.
    pub name: String,
    /// The source's examples.
    pub examples: Examples<'a>,
}

impl<'a> From<Data<'a>> for Sets<'a> {
    fn from(data: Data<'a>) -> Sets<'a> {
        let source = Source { entry: 0, name: String::new(), examples: data.evaluation.into() };
        Sets { train: data.train.into(), evaluation: vec![source] }
    }
}

//! The result of a job -> lines for people, and Kubernetes' termination message.

use std::path::PathBuf;

use crate::registry::Pushed;
use crate::report::termination::Outcome;
use crate::train::Trained;

/// The result of a job.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The output folder.
    pub folder: PathBuf,
    /// Result of training.
    pub trained: Trained,
    /// The pushed image, if the plan asks for one.
    pub pushed: Option<Pushed>,
}

impl Receipt {
    /// The result as lines for people; the first one is empty.
    pub fn text(&self) -> String {
        let trained = &self.trained;
        let mut text = format!(
            "\nTrained {} steps, {} tokens in {:.1} s ({:.0} tokens/s): loss {:.4} -> {:.4}",
            trained.steps,
            trained.tokens,
            trained.seconds,
            trained.tokens_per_second,
            trained.first_loss,
            trained.loss
        );
        if let Some(eval_loss) = trained.eval_loss {
            text += &format!(", evaluation {eval_loss:.4}");
        }
        text += &format!("\nAdapter: {}", self.folder.display());
        if let Some(pushed) = &self.pushed {
            text += &format!("\nImage:   {}\n         {}", pushed.reference, pushed.digest);
        }
        text
    }

    /// The result for the termination message.
    pub fn outcome(self) -> Outcome {
        Outcome {
            fault: None,
            step: Some(self.trained.steps),
            loss: Some(self.trained.loss),
            eval_loss: self.trained.eval_loss,
            output: Some(self.folder),
            image: self.pushed.as_ref().map(|pushed| pushed.reference.clone()),
            digest: self.pushed.map(|pushed| pushed.digest),
        }
    }
}

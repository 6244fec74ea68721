//! The result of a job -> lines for people, and Kubernetes' termination message.

use std::path::PathBuf;

use crate::publish::Published;
use crate::report::termination::Outcome;
use crate::train::Trained;

/// The result of a job.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The output folder.
    pub folder: PathBuf,
    /// Result of training.
    pub trained: Trained,
    /// The places that the adapter was sent to.
    pub published: Vec<Published>,
}

impl Receipt {
    /// Returns the result as lines for people; the first one is empty.
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
        for sent in &self.published {
            let kind = if sent.image { "Image:" } else { "Sent to:" };
            text += &format!("\n{kind:<8} {}", sent.destination);
            text +=
                &sent.revision.as_ref().map(|revision| format!("\n         {revision}")).unwrap_or_default();
        }
        text
    }

    /// Returns the result for the termination message.
    pub fn outcome(self) -> Outcome {
        let image = self.published.into_iter().find(|sent| sent.image);
        Outcome {
            fault: None,
            step: Some(self.trained.steps),
            loss: Some(self.trained.loss),
            eval_loss: self.trained.eval_loss,
            output: Some(self.folder),
            image: image.as_ref().map(|image| image.destination.clone()),
            digest: image.and_then(|image| image.revision),
        }
    }
}

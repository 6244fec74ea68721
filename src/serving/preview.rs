//! A server that is not started -> the memory that it would have, on this machine or on named GPUs.

use std::path::PathBuf;

use serde_json::{Value as Json, json};

use super::room::{self, Described, Size};
use crate::fault::Result;
use crate::memory::Machine;
use crate::memory::serving::Plan;
use crate::plan::Serving;

/// Everything that `hone plan --serve` shows.
pub struct Preview<'a> {
    serving: &'a Serving,
    /// One for each GPU; at least one.
    plans: Vec<(Described, Machine, Plan)>,
}

/// Plans the memory of a server for each of the GPUs, or for this machine if there are none.
///
/// # Errors
/// Those of [`room::ahead`].
pub fn preview<'a>(
    serving: &'a Serving,
    size: &Size,
    adapters: &[PathBuf],
    gpus: &[String],
) -> Result<Preview<'a>> {
    let places: Vec<Option<&str>> = match gpus {
        [] => vec![None],
        names => names.iter().map(|name| Some(name.as_str())).collect(),
    };
    let ahead = |place: &Option<&str>| room::ahead(serving, size, adapters, *place);
    Ok(Preview { serving, plans: places.iter().map(ahead).collect::<Result<Vec<_>>>()? })
}

impl Preview<'_> {
    /// The preview as text for people.
    pub fn text(&self) -> String {
        let facts = &self.plans[0].0.facts;
        let mut text = format!(
            "model: {}, {}, {} layers of width {}, {} parameters\n",
            self.serving.model_name,
            facts.family,
            facts.layers.len(),
            facts.width,
            facts.parameters()
        );
        for (_, machine, plan) in &self.plans {
            text += &format!("\n{}\n", plan.table(machine).trim_end());
        }
        text
    }

    /// The preview as JSON: an object for one GPU, a list for several.
    pub fn json(&self) -> Json {
        let list: Vec<Json> = self.plans.iter().map(|plan| self.json_of(plan)).collect();
        if let [only] = list.as_slice() { only.clone() } else { list.into() }
    }

    fn json_of(&self, (described, machine, plan): &(Described, Machine, Plan)) -> Json {
        let facts = &described.facts;
        let mut json = plan.json(machine);
        json["model"] = json!({
            "name": self.serving.model_name, "family": facts.family, "layers": facts.layers.len(),
            "width": facts.width, "parameters": facts.parameters(),
        });
        json
    }
}

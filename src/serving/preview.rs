//! A server that is not started -> the memory that it would have, on this machine or on each of the named GPUs.

use std::path::PathBuf;

use serde_json::{Value as Json, json};

use super::room::{self, Described, Size};
use crate::facts::Facts;
use crate::fault::{Fault, Kind, Result};
use crate::memory::Machine;
use crate::memory::serving::Plan;
use crate::plan::Serving;

/// Everything that `hone plan --serve` shows.
pub struct Preview<'a> {
    serving: &'a Serving,
    facts: Facts,
    /// The plan for each GPU, or the reason why the server does not fit it.
    plans: Vec<std::result::Result<(Machine, Plan), Small>>,
}

/// A GPU that is too small.
struct Small {
    name: String,
    fault: Fault,
}

/// Plans the memory of a server for each of the GPUs, or for this machine if there are none.
///
/// # Errors
/// Capacity: it fits none of them. Others as [`room::ahead`].
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
    let (mut facts, mut plans, mut first) = (None, Vec::new(), None);
    for place in places {
        match room::ahead(serving, size, adapters, place) {
            Ok((Described { facts: found, .. }, machine, plan)) => {
                facts = Some(found);
                plans.push(Ok((machine, plan)));
            }
            Err(fault) if fault.kind == Kind::Capacity => {
                first.get_or_insert(fault.clone());
                plans.push(Err(Small { name: place.unwrap_or_default().to_owned(), fault }));
            }
            Err(fault) => return Err(fault),
        }
    }
    match (facts, first) {
        (Some(facts), _) => Ok(Preview { serving, facts, plans }),
        (None, Some(fault)) => Err(fault),
        (None, None) => Err(Fault::internal("a plan without a machine")),
    }
}

impl Preview<'_> {
    /// Returns the preview as text for people.
    pub fn text(&self) -> String {
        let facts = &self.facts;
        let mut text = format!(
            "model: {}, {}, {} layers of width {}, {} parameters\n",
            self.serving.model_name,
            facts.family,
            facts.layers.len(),
            facts.width,
            facts.parameters()
        );
        for plan in &self.plans {
            text += &match plan {
                Ok((machine, plan)) => format!("\n{}\n", plan.table(machine).trim_end()),
                Err(small) => format!("\n{} does not fit: {}\n", small.name, small.fault),
            };
        }
        text
    }

    /// Returns the preview as JSON: an object for one GPU, a list for several.
    pub fn json(&self) -> Json {
        let list = self.plans.iter().map(|plan| match plan {
            Ok((machine, plan)) => self.json_of(machine, plan),
            Err(small) => json!({"machine": small.name, "does_not_fit": small.fault.clone().in_a_line()}),
        });
        let list: Vec<Json> = list.collect();
        if let [only] = list.as_slice() { only.clone() } else { list.into() }
    }

    fn json_of(&self, machine: &Machine, plan: &Plan) -> Json {
        let facts = &self.facts;
        let mut json = plan.json(machine);
        json["model"] = json!({
            "name": self.serving.model_name, "family": facts.family, "layers": facts.layers.len(),
            "width": facts.width, "parameters": facts.parameters(),
        });
        json
    }
}

//! A plan -> what `hone plan` shows: its settings, the model, the adapter, the expected time, and the memory plan.

use serde_json::{Value as Json, json};

use super::described::{Described, by_name, check_small_files, describe};
use super::estimate::{self, Estimate};
use super::room;
use crate::fault::{Fault, Result};
use crate::memory::Running;
use crate::plan::Plan;

/// Everything that `hone plan` shows of a run.
pub struct Preview<'a> {
    plan: &'a Plan,
    /// `None` if the model is not on this machine. A plan fetches nothing, so all that depends on the model is unknown.
    model: Option<Model>,
}

struct Model {
    described: Described,
    estimate: Estimate,
    /// The memory plan, or why there is none.
    memory: Result<Running>,
}

/// Looks at a plan: for GPUs by their names or instance types, with prices `NAME=DOLLARS`, or else for this machine.
///
/// # Errors
/// The errors of [`describe`], [`check_small_files`] and [`estimate::estimate`].
pub fn preview<'a>(plan: &'a Plan, gpus: &[String], prices: &[String]) -> Result<Preview<'a>> {
    let described = match plan.model.folder.join("config.json").exists() {
        true => {
            let described = describe(plan)?;
            check_small_files(plan, &described)?;
            described
        }
        // A preset's sizes are known without its files.
        false => match by_name(plan)? {
            Some(described) => described,
            None => return Ok(Preview { plan, model: None }),
        },
    };
    let estimate = estimate::estimate(plan, &described, gpus, prices)?;
    // Several GPUs are compared. The memory plan shown is that of the first GPU that fits, or of this machine.
    let fitting = estimate.gpus.iter().find(|gpu| gpu.speed.is_ok()).or(estimate.gpus.first());
    let memory = room::plan(plan, &described, fitting.map(|gpu| gpu.name.as_str()));
    Ok(Preview { plan, model: Some(Model { described, estimate, memory }) })
}

impl Preview<'_> {
    /// Returns the preview as paragraphs for people. If there is no memory plan, its paragraph is the fault, so that
    /// all others are still seen.
    pub fn paragraphs(&self) -> Vec<Result<String>> {
        let plan = self.plan.table();
        let Some(Model { described, estimate, memory }) = &self.model else {
            return vec![Ok(plan), Ok(format!("\nmodel: {}", self.missing()))];
        };
        let facts = &described.facts;
        let mut model = format!(
            "\nmodel: {}, {} layers of width {}, {} parameters\nadapter: {} linear layers, {} trainable parameters",
            facts.family,
            facts.layers.len(),
            facts.width,
            facts.parameters(),
            described.sites.list.len(),
            described.sites.parameters()
        );
        for warning in described.sites.warnings() {
            model += &format!("\nwarning: {warning}");
        }
        let memory = memory.as_ref().map_err(Fault::clone).map(|memory| {
            format!("\nmemory, if all examples have the largest number of tokens:\n{}", memory.table())
        });
        vec![Ok(plan), Ok(model), Ok(format!("\n{}", estimate.table())), memory]
    }

    /// Returns the preview as JSON.
    ///
    /// # Errors
    /// Capacity, or why else there is no memory plan.
    pub fn json(&self) -> Result<Json> {
        let mut json = self.plan.json();
        let Some(Model { described, estimate, memory }) = &self.model else {
            json["model"] = json!({ "missing": self.missing() });
            return Ok(json);
        };
        let facts = &described.facts;
        json["model"] = json!({
            "family": facts.family, "layers": facts.layers.len(), "width": facts.width, "parameters": facts.parameters(),
        });
        let sites: Vec<&str> = described.sites.list.iter().map(|site| site.path.as_str()).collect();
        json["adapter"] =
            json!({"trainable_parameters": described.sites.parameters(), "linear_layers": sites});
        if let Some(warnings) = json["warnings"].as_array_mut() {
            warnings.extend(described.sites.warnings().into_iter().map(Json::String));
        }
        json["estimate"] = estimate.json();
        let memory = memory.as_ref().map_err(Fault::clone)?;
        json["memory"] = memory.plan.json(&memory.machine);
        Ok(json)
    }

    fn missing(&self) -> String {
        format!(
            "not on this machine yet: `hone model {}` fetches its small files, `hone run` all of it; after that its facts and the memory plan are shown",
            self.plan.base
        )
    }
}

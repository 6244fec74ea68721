//! A plan -> the table for people, and the same as JSON.

use serde_json::{Value as Json, json};

use crate::facts::{Keep, Precision, Residency};

use crate::words::size;

use super::cost::{ATTENTION_SHARE, COPY_SHARE, EIGHT_BITS_TIMES, MATRIX_SHARE};
use super::machine::{Machine, Place};
use super::plan::Plan;
use super::task::Task;
use super::terms::EXPANDED;

/// Returns the terms in one line, largest first.
pub(super) fn list(plan: &Plan) -> String {
    let mut terms: Vec<_> = plan.terms.iter().filter(|term| term.bytes > 0).collect();
    terms.sort_by_key(|term| std::cmp::Reverse(term.bytes));
    terms.iter().map(|term| format!("{} {}", term.what, size(term.bytes))).collect::<Vec<_>>().join(", ")
}

impl Plan {
    /// Returns the table: one line per term, the sum, and the chosen tokens and levels.
    pub fn table(&self, task: &Task, machine: &Machine) -> String {
        let wide = self.terms.iter().map(|term| term.what.len()).max().unwrap_or(0).max(8);
        let line = |what: &str, bytes: u64| format!("{what:<wide$}  {:>10}\n", size(bytes));
        let mut table: String = self.terms.iter().map(|term| line(&term.what, term.bytes)).collect();
        table += &line("in all", self.bytes());
        table += &line(&format!("usable on {}", machine.name), self.memory);
        table += &format!("{}\n", self.choice());
        let lines = [self.expanded(), self.inputs(machine), self.weights(machine), self.graphs(machine)];
        table += &lines.into_iter().flatten().map(|line| format!("{line}\n")).collect::<String>();
        if machine.place == Place::Gpu {
            table += &format!("{}\n", self.prediction(task, machine));
        }
        table
    }

    /// Returns the chosen tokens and levels: `4096 tokens a pass; kept: everything in 20 layers, layer-inputs in 12`.
    pub fn choice(&self) -> String {
        let of = |level: Keep| (level, self.keep.iter().filter(|keep| **keep == level).count());
        let levels = Keep::ALL.into_iter().map(of).filter(|(_, layers)| *layers > 0);
        let levels = levels.map(|(level, layers)| format!("{} in {layers} layers", level.name()));
        format!("{} tokens a pass; kept: {}", self.tokens, levels.collect::<Vec<_>>().join(", "))
    }

    /// Returns the line about the time that expanded weights save.
    fn expanded(&self) -> Option<String> {
        let bytes: u64 =
            self.terms.iter().filter(|term| term.what.starts_with(EXPANDED)).map(|term| term.bytes).sum();
        (self.expanded > 0).then(|| {
            format!(
                "weights of {} of {} layers are kept expanded beside their 4 bits, since no other use of {} saves as much: \
                 each pass takes {:.1} ms less ({:.1} ms a GB)",
                self.expanded,
                self.keep.len(),
                size(bytes),
                1e3 * self.expanded_saves,
                1e3 * self.expanded_saves / (bytes as f64 / 1e9)
            )
        })
    }

    /// Returns the line about inputs of layers that are copied to the host, and back when they are needed.
    fn inputs(&self, machine: &Machine) -> Option<String> {
        let layers = self.keep.iter().filter(|keep| **keep == Keep::HostInputs).count();
        (self.host_inputs > 0).then(|| {
            format!(
                "inputs of {layers} layers are kept in {} of host memory; they are copied there and back at {:.0} GB/s beside \
                 the computation",
                size(self.host_inputs),
                machine.rates.link / 1e9
            )
        })
    }

    /// Returns the line about graphs of passes.
    fn graphs(&self, machine: &Machine) -> Option<String> {
        (machine.place == Place::Gpu && self.graph_bytes() > 0).then(|| {
            format!(
                "passes are launched as CUDA graphs from the second pass of a size on; their tensors take up to {} of the \
                 remaining memory",
                size(self.graph_bytes())
            )
        })
    }

    /// Returns the line about the place of the layers' weights, if it is not the device, and about its cost.
    fn weights(&self, machine: &Machine) -> Option<String> {
        let (what, rate) = match self.residency {
            Residency::Resident => return None,
            Residency::Shared => (
                format!(
                    "weights of the layers are shared over {} ranks, since all of them do not fit on one device; each pass gathers",
                    self.ranks
                ),
                machine.rates.peer,
            ),
            Residency::Streamed => (
                format!(
                    "weights of the layers are streamed from {} of host memory, since they do not fit on the device; each pass copies",
                    size(self.host_bytes)
                ),
                machine.rates.link,
            ),
        };
        Some(format!(
            "{what} {} at {:.0} GB/s beside its computation and waits {:.1} of {:.1} s for them",
            size(self.brought),
            rate / 1e9,
            self.waits,
            self.seconds
        ))
    }

    fn prediction(&self, task: &Task, machine: &Machine) -> String {
        let rates = &machine.rates;
        format!(
            "predicted {:.0} tokens/s with examples of {} tokens, {:.0} % of the matrix rate ({} {:.0} TFLOP/s, copies {:.2} TB/s; \
             products at {:.0} %{}, attention at {:.0} %, passes over memory at {:.0} % of them)",
            self.tokens_per_second(),
            task.example_tokens.min(self.tokens),
            100.0 * self.flops / self.seconds / rates.matrix,
            if rates.measured { "measured" } else { "assumed" },
            rates.matrix / 1e12,
            rates.copy / 1e12,
            100.0 * MATRIX_SHARE,
            match task.precision {
                Precision::Fp8 => format!(" and in 8 bits {EIGHT_BITS_TIMES} times as fast"),
                Precision::F32 | Precision::Bf16 => String::new(),
            },
            100.0 * ATTENTION_SHARE,
            100.0 * COPY_SHARE,
        ) + &self.together()
    }

    /// Returns the speed of all ranks, if there are several.
    fn together(&self) -> String {
        match self.ranks {
            1 => String::new(),
            ranks => format!(
                "; {ranks} of them reach {:.0} tokens/s ({:.0} % of {ranks} times one), if each step has a pass for each",
                self.tokens_per_second_in_all(),
                100.0 * self.efficiency
            ),
        }
    }

    /// Returns the plan as `{"terms": {what: bytes}, "bytes", "memory", "tokens", "keep": [...], "tokens_per_second",
    /// "rates"}`.
    pub fn json(&self, machine: &Machine) -> Json {
        let terms: serde_json::Map<String, Json> =
            self.terms.iter().map(|term| (term.what.clone(), term.bytes.into())).collect();
        let keep: Vec<&str> = self.keep.iter().map(|keep| keep.name()).collect();
        let mut json = json!({
            "machine": machine.name, "terms": terms, "bytes": self.bytes(), "memory": self.memory,
            "tokens": self.tokens, "keep": keep, "residency": self.residency.name(), "ranks": self.ranks,
        });
        if self.expanded > 0 {
            json["layers_expanded"] = self.expanded.into();
            json["seconds_saved_by_expanded"] = self.expanded_saves.into();
        }
        if self.host_inputs > 0 {
            json["host_input_bytes"] = self.host_inputs.into();
        }
        if self.residency != Residency::Resident {
            json["host_bytes"] = self.host_bytes.into();
            json["brought_bytes"] = self.brought.into();
            json["seconds"] = self.seconds.into();
            json["waiting_seconds"] = self.waits.into();
        }
        if machine.place == Place::Gpu {
            let rates = &machine.rates;
            json["tokens_per_second"] = self.tokens_per_second().round().into();
            if self.ranks > 1 {
                json["tokens_per_second_in_all"] = self.tokens_per_second_in_all().round().into();
            }
            json["rates"] = json!({"matrix": rates.matrix, "copy": rates.copy, "measured": rates.measured});
        }
        json
    }
}

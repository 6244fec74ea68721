//! Requests that change the served models: load and unload adapters, change mixes. They need the server's permission (a
//! flag).

use hyper::StatusCode;
use serde_json::{Value, json};

use super::ask;
use super::error::{Error, Result};
use super::fields::Fields;
use super::model::{Bring, Model};
use super::reply::{Answer, json_answer};
use crate::generate::Strength;

fn changeable(model: &Model) -> Result<&Bring> {
    model.bring.as_ref().ok_or_else(|| {
        Error::new(
            StatusCode::FORBIDDEN,
            "Adapters and mixes cannot be changed here; start the server with --allow-adapter-changes",
        )
    })
}

fn missing(name: &str) -> Error {
    Error::field(name, format!("{name} is missing"))
}

/// Returns a part of a mix with the digest of the adapter that is loaded now.
pub fn part(model: &Model, part: &Strength) -> Value {
    let origin = model.named.origin(&part.name);
    // As it was written: 0.3 is not 0.30000001192092896.
    let strength: f64 = part.strength.to_string().parse().unwrap_or(part.strength.into());
    json!({
        "name": part.name, "strength": strength, "digest": origin.digest, "source": origin.source,
    })
}

/// Loads an adapter. The body is vLLM's: `{lora_name, lora_path, load_inplace}`.
pub fn load(fields: &Fields, model: &Model) -> Answer {
    let bring = changeable(model)?;
    let name = fields.text("lora_name")?.ok_or_else(|| missing("lora_name"))?;
    let path = fields.text("lora_path")?.ok_or_else(|| missing("lora_path"))?;
    fields.refuse(
        "strength",
        &[json!(1), json!(1.0)],
        "an adapter has strength 1; make a mix for another one",
    )?;
    let again = fields.flag("load_inplace")?.unwrap_or(false);
    if !super::is_name(name) {
        return Err(Error::field("lora_name", format!("lora_name {name:?}: {}", super::NAME_RULE)));
    }
    let loaded = model.engine.adapters().iter().any(|adapter| adapter.name == name);
    if model.names().iter().any(|taken| taken == name) && !(again && loaded) {
        let what = match loaded {
            true => "exists; unload it, or say load_inplace: true",
            false => "is the base or a mix; give the adapter another name",
        };
        return Err(Error::field("lora_name", format!("`{name}` {what}")));
    }
    let failed = |fault| Error::from(fault).of("lora_path");
    let adapter = model.load_adapter(name, bring(path).map_err(failed)?).map_err(failed)?;
    let origin = model.named.origin(name);
    Ok(json_answer(&json!({
        "status": format!("Success: LoRA adapter '{name}' added successfully."),
        "name": adapter.name, "rank": adapter.rank, "bytes": adapter.bytes,
        "digest": origin.digest, "source": origin.source,
    })))
}

/// Unloads an adapter. The body is vLLM's: `{lora_name}`.
pub fn unload(fields: &Fields, model: &Model) -> Answer {
    changeable(model)?;
    let name = fields.text("lora_name")?.ok_or_else(|| missing("lora_name"))?;
    let loaded = model.engine.adapters();
    if !loaded.iter().any(|adapter| adapter.name == name) {
        return Err(Error::unknown_adapter(name, &loaded).of("lora_name"));
    }
    let mixes = model.named.mixes();
    if let Some((mix, _)) = mixes.iter().find(|(_, parts)| parts.iter().any(|part| part.name == name)) {
        return Err(Error::field("lora_name", format!("`{name}` is a part of the mix `{mix}`")));
    }
    keep_default(model, name, "lora_name")?;
    model.engine.unload_adapter(name)?;
    Ok(json_answer(&json!({"status": format!("Success: LoRA adapter '{name}' removed successfully.")})))
}

/// Refuses to remove the name that answers requests without a model: all of them would fail.
fn keep_default(model: &Model, name: &str, field: &str) -> Result<()> {
    match model.fixed_default() == Some(name) {
        true => Err(Error::field(
            field,
            format!(
                "`{name}` answers requests that name no model (--default); start the server with another one"
            ),
        )),
        false => Ok(()),
    }
}

/// Answers a request `{name, adapters: [{name, strength}]}`: makes a mix, or changes the mix of that name for later
/// requests.
pub fn mix(fields: &Fields, model: &Model) -> Answer {
    changeable(model)?;
    let name = fields.text("name")?.ok_or_else(|| missing("name"))?;
    if !super::is_name(name) {
        return Err(Error::field("name", format!("name {name:?}: {}", super::NAME_RULE)));
    }
    if let Some(other) = fields.unknown(&["name", "adapters"]).first() {
        return Err(Error::field(other, format!("`{other}` is unknown; expected name and adapters")));
    }
    let known = model.named.mix(name).is_some();
    if !known && model.names().iter().any(|taken| taken == name) {
        return Err(Error::field(
            "name",
            format!("`{name}` is the base or an adapter; a mix needs another name"),
        ));
    }
    let parts = ask::strengths(fields, model)?.ok_or_else(|| missing("adapters"))?;
    if parts.is_empty() {
        return Err(Error::field(
            "adapters",
            format!(
                "adapters is empty, so that the mix would be the base; DELETE /v1/mixes/{name} removes it"
            ),
        ));
    }
    model.named.set_mix(name, parts.clone());
    Ok(json_answer(&one(model, name, &parts)))
}

/// Returns every mix.
pub fn mixes(model: &Model) -> Value {
    let list = model.named.mixes();
    let list: Vec<Value> = list.iter().map(|(name, parts)| one(model, name, parts)).collect();
    json!({"object": "list", "data": list})
}

/// Answers `DELETE /v1/mixes/NAME`.
pub fn remove_mix(model: &Model, name: &str) -> Answer {
    changeable(model)?;
    keep_default(model, name, "name")?;
    match model.named.remove_mix(name) {
        true => Ok(json_answer(&json!({"name": name, "deleted": true}))),
        false => {
            let names: Vec<String> = model.named.mixes().into_iter().map(|(name, _)| name).collect();
            let message = format!("There is no mix `{name}`; there are: {}", names.join(", "));
            Err(Error::new(StatusCode::NOT_FOUND, message).of("name"))
        }
    }
}

fn one(model: &Model, name: &str, parts: &[Strength]) -> Value {
    let parts: Vec<Value> = parts.iter().map(|strength| part(model, strength)).collect();
    json!({"name": name, "adapters": parts})
}

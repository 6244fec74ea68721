//! Keys -> how rows are read and become tokens.

use super::places::Entries;
use super::reader::Reader;
use crate::dataset::{self, BadRows, Layout, LossOn, Names, TokenCache, TokenOptions};
use crate::plain;
use crate::spec::Origin;
use crate::spec::keys::Section;
use crate::spec::value::Value as Written;
use std::path::Path;

/// LIMIT: the length of examples that are not cut; it is above every supported model's context.
pub(super) const TOKENS_UNLIMITED: usize = 1 << 20;
/// LIMIT: the longest chat template in use has 20 KiB.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

pub(super) fn dataset_options(reader: &mut Reader, entries: &Entries) -> dataset::Options {
    let layout = reader.text(Section::Hone, "layout").and_then(|layout| Layout::of_key(&layout));
    let train_share = train_share(reader, entries);
    let answer = reader.text(Section::DatasetConfig, "response_column");
    let text_field_is_given = reader.is_given(Section::TrainingArguments, "dataset_text_field");
    let text_field = reader.text(Section::TrainingArguments, "dataset_text_field");
    let text_column = match layout {
        _ if text_field_is_given => text_field,
        Some(Layout::Text) => answer.clone(),
        _ => None,
    };
    dataset::Options {
        layout,
        messages_column: reader.text(Section::DatasetConfig, "messages_column"),
        prompt_column: reader.text(Section::DatasetConfig, "context_column"),
        completion_column: answer,
        text_column,
        question_column: reader.text(Section::Hone, "question_column"),
        shares: entries.shares.clone(),
        container: reader.text(Section::DatasetConfig, "dataset_extension"),
        names: names(reader),
        bad_rows: bad_rows(reader),
        shuffle: reader.boolean(Section::DatasetConfig, "shuffle_dataset"),
        seed: reader.integer(Section::DatasetConfig, "shuffle_seed") as u64,
        train_share,
        evaluation_from: entries.evaluation_from,
        group_column: group_column(reader, train_share),
    }
}

/// Returns the share of rows that train: all, if evaluation has data of its own.
fn train_share(reader: &mut Reader, entries: &Entries) -> f64 {
    let given = reader.given(Section::DatasetConfig, "train_test_split").is_some();
    let share = reader.number(Section::DatasetConfig, "train_test_split");
    let origin = reader.origin(Section::DatasetConfig, "train_test_split");
    if share == 0.0 {
        reader.wrong(
            &origin,
            "DatasetConfig.train_test_split: 0 leaves no rows to train on; 1 trains on all of them",
        );
    }
    if entries.evaluation_from.is_none() {
        return share;
    }
    if given && share < 1.0 {
        reader.wrong(
            &origin,
            format!(
                "DatasetConfig.train_test_split: {share} would set rows of `data` aside, but evaluation_data names the rows \
                 to evaluate on; set it to 1 or remove one of the two"
            ),
        );
    }
    let origin = reader.origin(Section::Hone, "evaluation_data");
    reader.derive("rows to evaluate on", "all of evaluation_data, none of data", origin);
    1.0
}

fn group_column(reader: &mut Reader, train_share: f64) -> Option<String> {
    let column = reader.text(Section::Hone, "group_column").filter(|column| !column.is_empty())?;
    if train_share < 1.0 {
        return Some(column);
    }
    let origin = reader.origin(Section::Hone, "group_column");
    reader.warn(format!(
        "{origin}: group_column has no effect: no rows of `data` are set aside for evaluation"
    ));
    None
}

pub(super) fn token_options(reader: &mut Reader) -> TokenOptions {
    let given = reader.given(Section::TrainingArguments, "max_length").map(|given| given.value.clone());
    let mut tokens_max = reader.integer(Section::TrainingArguments, "max_length") as usize;
    if given == Some(Written::Null) {
        tokens_max = TOKENS_UNLIMITED;
        reader.show_null(Section::TrainingArguments, "max_length");
    }
    TokenOptions {
        tokens_max,
        loss: loss(reader),
        chat_template: chat_template(reader),
        bad_rows: bad_rows(reader),
    }
}

/// Returns the place of the token cache: beside the downloads, unless the key names a folder or says `off`.
pub(super) fn token_cache(reader: &mut Reader, cache: &Path) -> TokenCache {
    match reader.text(Section::Hone, "token_cache").as_deref() {
        // YAML 1.1 knows `off` as a boolean, so that a template may write it as `false`.
        Some(text) if ["off", "false"].iter().any(|word| text.eq_ignore_ascii_case(word)) => TokenCache::Off,
        Some(folder) => TokenCache::Folder { path: folder.into(), named: true },
        None => TokenCache::Folder { path: cache.join("tokens"), named: false },
    }
}

fn names(reader: &mut Reader) -> Names {
    let names = written_names(reader);
    let same = |word: &&String| names.user.iter().any(|user| user.to_lowercase() == word.to_lowercase());
    if let Some(word) = names.assistant.iter().find(same) {
        let origin = reader.origin(Section::Hone, "assistant_names");
        reader.wrong(&origin, format!("assistant_names: {word:?} is among user_names too"));
    }
    names
}

fn written_names(reader: &mut Reader) -> Names {
    Names {
        role_field: reader.text(Section::Hone, "role_field"),
        content_field: reader.text(Section::Hone, "content_field"),
        system_column: reader.text(Section::Hone, "system_column"),
        tools_column: reader.text(Section::Hone, "tools_column"),
        user: reader.texts(Section::Hone, "user_names"),
        assistant: reader.texts(Section::Hone, "assistant_names"),
    }
}

fn bad_rows(reader: &mut Reader) -> BadRows {
    let share_max = reader.number(Section::Hone, "bad_rows_max");
    match reader.text(Section::Hone, "bad_rows").as_deref() {
        Some("drop") => BadRows::Drop { share_max },
        _ => BadRows::Refuse,
    }
}

/// Returns the tokens that carry loss: answers, unless a key says false and none says true.
fn loss(reader: &mut Reader) -> LossOn {
    let keys = ["completion_only_loss", "assistant_only_loss"];
    let said = keys.map(|name| {
        let value = reader.maybe_boolean(Section::TrainingArguments, name);
        (value, reader.origin(Section::TrainingArguments, name))
    });
    let find =
        |wanted| said.iter().find(|(value, _)| *value == Some(wanted)).map(|(_, origin)| origin.clone());
    let (loss, origin) = match (find(true), find(false)) {
        (None, Some(origin)) => (LossOn::Everything, origin),
        (origin, _) => (LossOn::Answers, origin.unwrap_or(Origin::Default)),
    };
    reader.derive("loss on", if loss == LossOn::Answers { "answers" } else { "every token" }, origin);
    loss
}

/// Returns the chat template: the value itself if it looks like Jinja text, or else the text of the file that it names.
fn chat_template(reader: &mut Reader) -> Option<String> {
    let older = reader.text(Section::TrainingArguments, "chat_template_path");
    let mut origin = reader.origin(Section::ModelConfig, "chat_template");
    let text = match reader.text(Section::ModelConfig, "chat_template") {
        Some(text) if text.contains(['{', '}', '\n']) => return Some(text),
        Some(path) => path,
        None => {
            origin = reader.origin(Section::TrainingArguments, "chat_template_path");
            older?
        }
    };
    let read = || {
        use std::io::Read;
        let mut template = String::new();
        plain::open(text.as_ref())?.take(TEMPLATE_BYTES_MAX + 1).read_to_string(&mut template)?;
        Ok::<_, std::io::Error>(template)
    };
    match read() {
        Ok(template) if template.len() as u64 <= TEMPLATE_BYTES_MAX => Some(template),
        Ok(_) => {
            reader.wrong(&origin, format!("chat template {text}: more than {TEMPLATE_BYTES_MAX} bytes"));
            None
        }
        // This may be the name of one of the model's own templates, which has no dot and no slash. The tokenizer
        // knows them.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !text.contains(['.', '/']) => {
            Some(text)
        }
        Err(error) => {
            reader.wrong(
                &origin,
                format!("chat template {text}: {error}; expected Jinja text, a file of it, or a name of one of the model's templates"),
            );
            None
        }
    }
}

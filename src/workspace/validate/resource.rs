//! The resource of a Workspace (nodes and their labels) -> what is wrong with it.

use super::Rules;
use crate::workspace::annotations::object_name;
use crate::workspace::kind::Resource;

/// LIMIT: nodes of a Workspace. A larger number is a typing error.
const NODES_MAX: i32 = 100;

impl Rules {
    /// Checks a name that a Service, and pods with a number behind the name, have too. Kubernetes refuses Services that
    /// begin with a digit, and cannot create such pods if the name is longer.
    pub(super) fn name_of_a_service(&mut self, name: &str, does: &str) {
        const LENGTH_MAX: usize = 52;
        if name.len() > LENGTH_MAX || name.starts_with(|c: char| c.is_ascii_digit()) {
            self.wrong(
                "metadata.name",
                format!("a Workspace that {does} needs a letter first and at most {LENGTH_MAX} characters, found {name:?}"),
            );
        }
    }

    pub(super) fn resource_that_serves(&mut self, resource: &Resource) {
        if let Some(count) = resource.count.filter(|count| !(1..=NODES_MAX).contains(count)) {
            self.wrong("resource.count", format!("expected 1 to {NODES_MAX} servers, found {count}"));
        }
        if resource.partition.is_some() {
            self.wrong("resource.partition", "a part of a GPU cannot serve; remove it");
        }
        self.selector(resource);
    }

    pub(super) fn resource(&mut self, resource: &Resource) {
        if let Some(count) = resource.count.filter(|count| !(1..=NODES_MAX).contains(count)) {
            self.wrong("resource.count", format!("expected 1 to {NODES_MAX} nodes, found {count}"));
        }
        if resource.partition.is_some() {
            self.wrong("resource.partition", "a part of a GPU cannot tune; remove it");
        }
        self.selector(resource);
    }

    pub(super) fn selector(&mut self, resource: &Resource) {
        let Some(selector) = &resource.label_selector else {
            return self.wrong(
                "resource.labelSelector",
                "missing; name labels of the nodes, such as matchLabels: {apps: tuning}",
            );
        };
        let labels = selector.match_labels.iter().flatten().map(|(key, value)| (key, vec![value.clone()]));
        let expressions = selector.match_expressions.iter().flatten();
        let expressions =
            expressions.map(|expression| (&expression.key, expression.values.clone().unwrap_or_default()));
        for (key, values) in labels.chain(expressions) {
            self.label(key, &values);
        }
        for expression in selector.match_expressions.iter().flatten() {
            let (known, values) = match expression.operator.as_str() {
                "In" | "NotIn" => (true, true),
                "Exists" | "DoesNotExist" => (true, false),
                _ => (false, false),
            };
            let has_values = expression.values.as_ref().is_some_and(|values| !values.is_empty());
            if !known || values != has_values {
                self.wrong(
                    "resource.labelSelector.matchExpressions",
                    format!(
                        "{} {}: expected In or NotIn with values, Exists or DoesNotExist without",
                        expression.key, expression.operator
                    ),
                );
            }
        }
    }

    /// Checks Kubernetes' syntax of labels.
    pub(super) fn label(&mut self, key: &str, values: &[String]) {
        const FIELD: &str = "resource.labelSelector";
        const ALLOWED: &str = "up to 63 of A-Z, a-z, 0-9, -, _ and ., with a letter or digit at both ends";
        let name = |text: &str| {
            let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
            text.len() <= 63
                && ends(text.chars().next())
                && ends(text.chars().next_back())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let (prefix, last) = key.split_once('/').map_or((None, key), |(prefix, last)| (Some(prefix), last));
        if !name(last) || prefix.is_some_and(|prefix| object_name(prefix).is_none()) {
            self.wrong(FIELD, format!("{key:?} cannot be the name of a label: allowed are {ALLOWED}, behind a domain and a / if any"));
        }
        for value in values.iter().filter(|value| !value.is_empty() && !name(value)) {
            self.wrong(FIELD, format!("{value:?} cannot be the value of a label: allowed are {ALLOWED}"));
        }
    }
}

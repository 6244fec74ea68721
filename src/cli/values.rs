//! Values of flags that several commands have, and the error of one that they do not take.

/// A whole number from 1.
pub(super) fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a whole number from 1".into())
}

/// The message about a flag with a value that it does not take.
pub(super) fn wrong(flag: &str, found: &str, expected: &str) -> String {
    format!("--{flag} {found:?}: expected {expected}")
}

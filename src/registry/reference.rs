//! Text -> `Target`: an OCI layout on disk, or an image reference, normalised as Docker does.

use oci_client::{ParseError, Reference};

use super::options::Target;
use crate::fault::{Fault, Result};

const TAG_DEFAULT: &str = "latest";
/// LIMIT: length of a tag, by the OCI distribution specification.
const TAG_CHARACTERS_MAX: usize = 128;

impl Target {
    /// Reads `oci:DIR`, `oci:DIR:tag`, or an image reference (`adapter` means `docker.io/library/adapter:latest`). If
    /// the last `:part` of DIR could be a tag, it is the tag. A reference by digest can only be pulled.
    pub fn parse(text: &str) -> Result<Target> {
        match text.strip_prefix("oci:") {
            Some(layout) => parse_layout(layout),
            None => Ok(Target::Registry(parse_reference(text)?.whole())),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Registry(reference) => write!(f, "{reference}"),
            Target::Layout { folder, tag } => write!(f, "oci:{}:{tag}", folder.display()),
        }
    }
}

/// Reads an image reference and fills in registry and tag (or digest).
pub(super) fn parse_reference(text: &str) -> Result<Reference> {
    if text.contains("://") {
        return Err(Fault::config("an image reference has no `scheme://`").help(
            "write `registry.example.com/team/adapter:v1`; plain HTTP is a separate option (--plain-http)",
        ));
    }
    if text.contains('@') && !text.contains("@sha256:") {
        // The text before the `@` may be a password, so it is not shown.
        return Err(Fault::config("an image reference has an `@` only in front of a `sha256:` digest")
            .help("put user names and passwords into docker's config.json"));
    }
    Reference::try_from(text).map_err(|error| match lower_cased(text) {
        Some(suggestion) => Fault::config(format!(
            "image `{text}` has upper-case letters in its repository; allowed are a-z, 0-9 and single . _ - / between them"
        ))
        .help(format!("use `{suggestion}`")),
        None => Fault::config(format!("image `{text}` is not a valid reference: {}", reason(&error)))
            .help("write `registry.example.com/team/adapter:v1`"),
    })
}

fn parse_layout(text: &str) -> Result<Target> {
    let (folder, tag) = match text.rsplit_once(':') {
        Some((folder, tag)) if !tag.contains('/') => (folder, tag),
        _ => (text, TAG_DEFAULT),
    };
    if folder.is_empty() {
        return Err(
            Fault::config(format!("`oci:{text}` names no folder")).help("write `oci:DIR` or `oci:DIR:tag`")
        );
    }
    if !is_tag(tag) {
        return Err(Fault::config(format!("`{tag}` in `oci:{text}` is not a tag")).help(
            "a tag has at most 128 characters of A-Z a-z 0-9 . _ - and does not start with `.` or `-`",
        ));
    }
    Ok(Target::Layout { folder: folder.into(), tag: tag.into() })
}

fn is_tag(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.starts_with(plain)
        && text.chars().all(|c| plain(c) || c == '.' || c == '-')
        && text.len() <= TAG_CHARACTERS_MAX
}

/// Returns the reference with a lower-case name, if that alone makes it valid. Tags keep their case.
fn lower_cased(text: &str) -> Option<String> {
    let name_end = text.rfind('/').unwrap_or(0);
    let tag_start = text[name_end..].find([':', '@']).map_or(text.len(), |at| name_end + at);
    let suggestion = format!("{}{}", text[..tag_start].to_ascii_lowercase(), &text[tag_start..]);
    (suggestion != text && Reference::try_from(suggestion.as_str()).is_ok()).then_some(suggestion)
}

fn reason(error: &ParseError) -> &'static str {
    match error {
        ParseError::NameEmpty => "it is empty",
        ParseError::NameTooLong => "its repository has more than 255 characters",
        ParseError::DigestInvalidLength | ParseError::DigestInvalidFormat => {
            "a sha256 digest has 64 hex digits"
        }
        ParseError::DigestUnsupported => "its digest is not sha256",
        _ => "expected [registry[:port]/]repository[:tag]",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Kind;

    #[test]
    fn references_are_normalised_as_docker_does() {
        for (text, whole) in [
            ("adapter", "docker.io/library/adapter:latest"),
            ("team/adapter", "docker.io/team/adapter:latest"),
            ("adapter:v1", "docker.io/library/adapter:v1"),
            ("localhost/adapter", "localhost/adapter:latest"),
            ("localhost:5000/a/b/c:T.1", "localhost:5000/a/b/c:T.1"),
            ("ghcr.io/team/a__b-c", "ghcr.io/team/a__b-c:latest"),
        ] {
            assert_eq!(Target::parse(text).unwrap(), Target::Registry(whole.into()), "{text}");
        }
        let digest = format!("ghcr.io/team/a@sha256:{}", "0a".repeat(32));
        assert_eq!(Target::parse(&digest).unwrap().to_string(), digest);
    }

    #[test]
    fn layouts_have_a_folder_and_a_tag() {
        for (text, folder, tag) in [
            ("oci:out", "out", "latest"),
            ("oci:/a/b:v1", "/a/b", "v1"),
            ("oci:/a:b/c", "/a:b/c", "latest"),
            ("oci:./x:y:z", "./x:y", "z"),
        ] {
            assert_eq!(
                Target::parse(text).unwrap(),
                Target::Layout { folder: folder.into(), tag: tag.into() },
                "{text}"
            );
        }
        for text in ["oci:", "oci::v1", "oci:a:", "oci:a:-x", "oci:a:b c"] {
            assert_eq!(Target::parse(text).unwrap_err().kind, Kind::Config, "{text}");
        }
    }

    #[test]
    fn upper_case_is_refused_with_the_lower_cased_suggestion() {
        let fault = Target::parse("ghcr.io/Team/Adapter:V1").unwrap_err();
        assert_eq!(fault.kind, Kind::Config);
        assert!(fault.message.contains("a-z, 0-9"), "{fault}");
        assert_eq!(fault.help.as_deref(), Some("use `ghcr.io/team/adapter:V1`"));
    }

    #[test]
    fn nonsense_is_refused_and_secrets_are_not_echoed() {
        for text in ["", "a b", "-a", "a/", "ghcr.io/a:", "ghcr.io/a@sha256:12", "a//b", "A-/b"] {
            assert_eq!(Target::parse(text).unwrap_err().kind, Kind::Config, "{text}");
        }
        for text in ["user:hunter2@ghcr.io/a", "https://user:hunter2@ghcr.io/a"] {
            assert!(!Target::parse(text).unwrap_err().to_string().contains("hunter2"));
        }
    }
}

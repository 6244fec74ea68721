//! A registry's refusal, or a broken connection -> whether a retry can help, and a message. Messages hold no secret.

use std::time::Duration;

use oci_client::errors::OciEnvelope;

use crate::fault::Fault;

/// LIMIT: length of a registry's own words in a message; some registries answer with a web page.
const TEXT_CHARACTERS_MAX: usize = 600;

/// One failed attempt.
#[derive(Debug)]
pub(super) struct Trouble {
    /// Kind of the failure.
    pub nature: Nature,
    /// HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// The registry's words, or the connection's error.
    pub text: String,
    /// The wait that the registry requests.
    pub wait: Option<Duration>,
}

/// The kind of a failed attempt.
#[derive(Debug)]
pub(super) enum Nature {
    /// A retry may help: connections, time-outs, 408, 429, 5xx.
    Transient,
    /// The credentials were refused: 401, 403.
    Unauthorized,
    /// The registry understood the request and refused it.
    Rejected,
    /// The registry's answer is not as the specification says.
    Violation,
    /// The TLS handshake failed, and would fail again.
    Untrusted { help: &'static str },
    /// A fault on this side, not of the registry.
    Ours(Box<Fault>),
}

impl Trouble {
    pub(super) fn transient(text: impl Into<String>) -> Trouble {
        Trouble { nature: Nature::Transient, status: None, text: text.into(), wait: None }
    }

    pub(super) fn rejected(text: impl Into<String>) -> Trouble {
        Trouble { nature: Nature::Rejected, ..Trouble::transient(text) }
    }

    pub(super) fn unauthorized(text: impl Into<String>) -> Trouble {
        Trouble { nature: Nature::Unauthorized, ..Trouble::transient(text) }
    }

    pub(super) fn violation(text: impl Into<String>) -> Trouble {
        Trouble { nature: Nature::Violation, ..Trouble::transient(text) }
    }

    /// Returns the trouble of an answer's status and body.
    pub(super) fn answer(status: u16, body: &str) -> Trouble {
        let nature = match status {
            401 | 403 => Nature::Unauthorized,
            408 | 425 | 429 => Nature::Transient,
            501 | 505 => Nature::Rejected,
            500.. => Nature::Transient,
            _ => Nature::Rejected,
        };
        let said = match serde_json::from_str::<OciEnvelope>(body) {
            Ok(envelope) => words(&envelope),
            Err(_) => body.trim().to_string(),
        };
        let text = if said.is_empty() { format!("HTTP {status}") } else { format!("HTTP {status}: {said}") };
        Trouble { nature, status: Some(status), text, wait: None }
    }

    /// Returns whether a monolithic upload was refused because it is one (413 of proxies and ACR, 405 of JFrog and
    /// others).
    pub(super) fn refuses_monolithic(&self) -> bool {
        matches!(self.nature, Nature::Violation)
            || matches!(self.status, Some(400 | 405 | 411 | 413 | 415 | 416 | 501))
    }
}

impl From<reqwest::Error> for Trouble {
    fn from(error: reqwest::Error) -> Trouble {
        let status = error.status().map(|status| status.as_u16());
        let refused = error.is_redirect();
        // The URL may carry upload state or a signature.
        let text = chain(&error.without_url());
        match status {
            Some(status) => Trouble::answer(status, ""),
            None if refused => Trouble::rejected(text),
            // This is rustls' error if a server answers a handshake in clear text.
            None if text.contains("InvalidContentType") => Trouble {
                nature: Nature::Untrusted {
                    help: "the registry seems to speak plain HTTP: ask for it explicitly (--plain-http) if it is yours",
                },
                ..Trouble::transient(text)
            },
            None if text.contains("certificate") => {
                let help = if text.contains("expired") {
                    "renew the registry's certificate"
                } else if text.contains("not valid for name") {
                    "use the host name the registry's certificate was made for"
                } else {
                    "give the registry's certificate or its authority's (--ca-file, or SSL_CERT_FILE)"
                };
                Trouble { nature: Nature::Untrusted { help }, ..Trouble::transient(text) }
            }
            None => Trouble::transient(text),
        }
    }
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Trouble {
        Trouble { nature: Nature::Ours(Box::new(fault)), ..Trouble::transient("") }
    }
}

/// Returns a registry's text, made fit for a message: one line, no control characters, no secret, not too long.
pub(super) fn clean(text: &str, secrets: &[String]) -> String {
    let mut text = text.to_string();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret.as_str(), "***");
    }
    let line: Vec<&str> = text.split_whitespace().collect();
    let line: String = line.join(" ").chars().filter(|c| !c.is_control()).collect();
    match line.char_indices().nth(TEXT_CHARACTERS_MAX) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

/// Returns `CODE: message` of each error, with its detail if that is plain text.
fn words(envelope: &OciEnvelope) -> String {
    let each = envelope.errors.iter().map(|error| {
        let code = serde_json::to_value(&error.code).unwrap_or_default();
        let detail = error.detail.as_str().map(|detail| format!(" ({detail})")).unwrap_or_default();
        format!("{}: {}{detail}", code.as_str().unwrap_or("UNKNOWN"), error.message)
    });
    each.collect::<Vec<String>>().join("; ")
}

/// Returns an error with its causes, each of them once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_upload_that_is_too_long_at_once_is_sent_in_chunks() {
        let chunks = |status| Trouble::answer(status, "").refuses_monolithic();
        assert!([400, 405, 411, 413, 415, 416, 501].into_iter().all(chunks));
        assert!(![401, 403, 404, 409, 429, 500, 503].into_iter().any(chunks));
        assert!(!Trouble::transient("the connection broke").refuses_monolithic());
    }

    #[test]
    fn statuses_say_whether_to_repeat() {
        for status in [408, 429, 500, 502, 503, 504, 599] {
            assert!(matches!(Trouble::answer(status, "").nature, Nature::Transient), "{status}");
        }
        for status in [400, 404, 405, 409, 413, 416, 501] {
            assert!(matches!(Trouble::answer(status, "").nature, Nature::Rejected), "{status}");
        }
        for status in [401, 403] {
            assert!(matches!(Trouble::answer(status, "").nature, Nature::Unauthorized), "{status}");
        }
    }

    #[test]
    fn the_registrys_words_are_kept() {
        let body = r#"{"errors":[{"code":"DENIED","message":"quota","detail":"10 GB"},{"code":"ODD","message":"x"}]}"#;
        assert_eq!(Trouble::answer(403, body).text, "HTTP 403: DENIED: quota (10 GB); ODD: x");
        assert_eq!(Trouble::answer(502, "<h1>Bad\n gateway</h1>\n").text, "HTTP 502: <h1>Bad\n gateway</h1>");
    }

    #[test]
    fn foreign_text_is_one_clean_line_without_secrets() {
        assert_eq!(clean("a\n\x1b[31mred canary\t!", &["canary".into(), String::new()]), "a [31mred *** !");
        assert_eq!(clean(&"x".repeat(5000), &[]).chars().count(), TEXT_CHARACTERS_MAX + 4);
    }
}

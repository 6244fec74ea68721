//! An error of a request -> OpenAI's error body and the status.

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::fault::{Fault, Kind};
use crate::generate::{Adapter, Refusal};

/// An answer that says why there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// Status of the HTTP answer.
    pub status: StatusCode,
    /// The message: the value found and the value expected.
    pub message: String,
    /// The field of the request.
    pub param: Option<String>,
    /// OpenAI's code, for programs.
    pub code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    pub retry_after: Option<u32>,
    /// Methods that the address takes.
    pub allow: Option<&'static str>,
}

/// LIMIT: characters of a message. It may quote what a client sent, which may be long.
const MESSAGE_MAX: usize = 2000;
/// Characters at the end of a long message that are kept: they say what was expected.
const MESSAGE_END: usize = 500;

fn shortened(message: String) -> String {
    let count = message.chars().count();
    if count <= MESSAGE_MAX {
        return message;
    }
    let begins: String = message.chars().take(MESSAGE_MAX - MESSAGE_END).collect();
    let ends: String = message.chars().skip(count - MESSAGE_END).collect();
    format!("{begins} ({} characters) {ends}", count - MESSAGE_MAX)
}

/// A result whose error is an answer to the client.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns an error about no field, without a code.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Error {
        Error {
            status,
            message: shortened(message.into()),
            param: None,
            code: None,
            retry_after: None,
            allow: None,
        }
    }

    /// 405: the address takes other methods.
    pub fn method(path: &str, method: &str, allow: &'static str) -> Error {
        let message = format!("{path} does not take {method}; it takes {allow}");
        Error { allow: Some(allow), ..Error::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    /// 400: the request must be changed.
    pub fn bad(message: impl Into<String>) -> Error {
        Error::new(StatusCode::BAD_REQUEST, message)
    }

    /// 429: the server has no room now, and asks the client to try again.
    pub fn busy(message: impl Into<String>) -> Error {
        Error { retry_after: Some(1), ..Error::new(StatusCode::TOO_MANY_REQUESTS, message) }
            .code("rate_limit_exceeded")
    }

    /// 400, and the field it is about.
    pub fn field(param: &str, message: impl Into<String>) -> Error {
        Error::bad(message).of(param)
    }

    /// Names the field that the error is about.
    pub fn of(mut self, param: &str) -> Error {
        self.param = Some(param.to_owned());
        self
    }

    /// Sets OpenAI's code.
    pub fn code(mut self, code: &'static str) -> Error {
        self.code = Some(code);
        self
    }

    /// Returns the error for a name that no model or adapter has.
    pub fn unknown_model(name: &str, known: &[String]) -> Error {
        let message = format!("The model `{name}` does not exist; there are: {}", known.join(", "));
        Error::new(StatusCode::NOT_FOUND, message).of("model").code("model_not_found")
    }

    /// No adapter of this name is loaded.
    pub fn unknown_adapter(name: &str, loaded: &[Adapter]) -> Error {
        let names: Vec<&str> = loaded.iter().map(|adapter| adapter.name.as_str()).collect();
        let known = if names.is_empty() {
            "none is loaded".into()
        } else {
            format!("there are: {}", names.join(", "))
        };
        let message = format!("The adapter `{name}` does not exist; {known}");
        Error::new(StatusCode::NOT_FOUND, message).of("adapters").code("model_not_found")
    }

    /// 503: loading or ending.
    pub fn unavailable(message: &str) -> Error {
        Error {
            retry_after: Some(5),
            ..Error::new(StatusCode::SERVICE_UNAVAILABLE, message).code("unavailable")
        }
    }

    /// Returns OpenAI's name for the kind of error.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "unavailable_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// Returns the body of the answer, as OpenAI's API writes errors.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind(), "param": self.param, "code": self.code,
        }})
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        match refusal {
            Refusal::Full { waiting } => {
                Error::busy(format!("Too many requests: {waiting} wait already; try again later"))
            }
            Refusal::UnknownAdapter(name) => {
                Error::new(StatusCode::NOT_FOUND, format!("No adapter `{name}` is loaded"))
                    .of("adapters")
                    .code("model_not_found")
            }
            Refusal::TooLong { asked, context } => too_long(asked, context),
            Refusal::UnknownToken { token, vocabulary } => Error::field(
                "prompt",
                format!(
                    "Token {token} is not in the vocabulary, which ends at {}",
                    vocabulary.saturating_sub(1)
                ),
            ),
            Refusal::Failed(fault) => fault.into(),
        }
    }
}

/// Returns the error for a request that is longer than the context.
pub fn too_long(asked: usize, context: usize) -> Error {
    Error::bad(format!(
        "This model's maximum context length is {context} tokens, but prompt and answer together ask for {asked}; \
         shorten the prompt or lower max_tokens"
    ))
    .code("context_length_exceeded")
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        let status = match fault.kind {
            Kind::Usage | Kind::Config | Kind::Data | Kind::Model | Kind::Auth | Kind::Capacity => {
                StatusCode::BAD_REQUEST
            }
            Kind::Network => StatusCode::BAD_GATEWAY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Error::new(status, fault.in_a_line())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_quotes_no_more_than_somebody_reads() {
        let long = "a".repeat(1_000_000);
        let message = Error::unknown_model(&long, &["base".to_owned()]).message;
        assert!(
            message.starts_with("The model `aaa") && message.ends_with("does not exist; there are: base")
        );
        assert!(
            message.contains(" (998044 characters) ") && message.chars().count() < 2100,
            "{}",
            message.len()
        );
        assert_eq!(Error::bad("short").message, "short");
    }
}

//! The environment -> the address of the Hugging Face hub and the token for it. The token is sent to that origin
//! only and appears in no message.

use std::path::PathBuf;

use reqwest::header::HeaderValue;
use url::Url;

use crate::fault::{Fault, Result};
use crate::plain;
use crate::report::clean::never_show;

const ENDPOINT: &str = "https://huggingface.co";

/// The hub, and the token for its gated repositories.
pub struct Hub {
    /// The hub's address.
    pub endpoint: Url,
    /// The header `Bearer ...`, marked as sensitive.
    authorization: Option<HeaderValue>,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, and the token from `HF_TOKEN`, else from the file `HF_TOKEN_PATH`, else from `token` in
    /// `HF_HOME` or `~/.cache/huggingface`. The order is that of the hub's own library.
    ///
    /// # Errors
    /// Config: the endpoint is not an HTTP address. Auth: the token cannot be a header's value.
    pub fn from_environment() -> Result<Hub> {
        Hub::from(&|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Hub> {
        let text = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = Url::parse(text.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let endpoint = endpoint.ok_or_else(|| {
            Fault::config("HF_ENDPOINT is not an http:// or https:// address")
                .help("give the hub's address, such as https://huggingface.co, or unset it")
        })?;
        let authorization = token(variable).map(|(token, origin)| header(&token, &origin)).transpose()?;
        Ok(Hub { endpoint, authorization })
    }

    /// Returns whether a URL has the hub's origin.
    pub fn owns(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// Returns the authorization header for a request to `url`. The HTTP client drops it at a redirect to another host
    /// or port.
    pub fn authorization(&self, url: &Url) -> Option<&HeaderValue> {
        self.authorization.as_ref().filter(|_| self.owns(url))
    }

    /// Returns the help for a 401 or 403 response of the hub.
    pub fn help(&self) -> &'static str {
        match self.authorization {
            Some(_) => {
                "the token may not read it: accept the terms on the repository's page with the token's account, or give the \
                 token of one that did (HF_TOKEN; in a Workspace modelAccessSecret)"
            }
            None => {
                "no token was given: set HF_TOKEN (in a Workspace modelAccessSecret) to one whose account accepted the terms \
                 on the repository's page; the hub also answers so to names that it does not know"
            }
        }
    }
}

fn header(token: &str, origin: &str) -> Result<HeaderValue> {
    never_show(token);
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
        Fault::auth(format!("the token of {origin} contains characters that a token cannot have"))
            .help("a token is one line that begins with hf_")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Returns (token, its place) of the first token found.
fn token(variable: &dyn Fn(&str) -> Option<String>) -> Option<(String, String)> {
    let home = variable("HF_HOME").map(PathBuf::from);
    let usual = || Some(PathBuf::from(variable("HOME")?).join(".cache/huggingface"));
    let file = variable("HF_TOKEN_PATH").map(PathBuf::from);
    let file = file.or_else(|| home.or_else(usual).map(|home| home.join("token")));
    let from_file = || {
        let file = file?;
        Some((plain::text(&file).ok()?, file.display().to_string()))
    };
    let found = variable("HF_TOKEN").map(|token| (token, "HF_TOKEN".to_owned())).or_else(from_file);
    found.map(|(token, origin)| (token.trim().to_owned(), origin)).filter(|(token, _)| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_goes_to_the_endpoint_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join(".cache/huggingface")).unwrap();
        std::fs::write(folder.path().join(".cache/huggingface/token"), "hf_home\n").unwrap();
        std::fs::write(folder.path().join("mounted"), "hf_file\n").unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let all = [("HOME", at("")), ("HF_TOKEN_PATH", at("mounted")), ("HF_TOKEN", "hf_variable".into())];
        let sent = |count: usize, url: &str| {
            let known = &all[..count];
            let variable =
                |name: &str| known.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
            let hub = Hub::from(&variable).unwrap();
            let value = hub.authorization(&Url::parse(url).unwrap());
            value.map_or("nothing".to_owned(), |value| value.to_str().unwrap().to_owned())
        };
        let here = "https://huggingface.co/datasets/a/b";
        assert_eq!(
            [0, 1, 2, 3].map(|count| sent(count, here)),
            ["nothing", "Bearer hf_home", "Bearer hf_file", "Bearer hf_variable"]
        );
        for other in [
            "http://huggingface.co/a",
            "https://huggingface.co:444/a",
            "https://cdn-lfs.huggingface.co/a",
            "https://huggingface.co.evil.org/a",
        ] {
            assert_eq!(sent(3, other), "nothing", "{other}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_without_being_shown() {
        let said = |name: &'static str, value: &'static str| {
            Hub::from(&|key| (key == name).then(|| value.to_owned())).err().unwrap().to_string()
        };
        assert!(!said("HF_TOKEN", "hf_se\u{1}cret").contains("secret"));
        assert!(!said("HF_ENDPOINT", "ftp://user:secret@host").contains("secret"));
    }
}

//! Redirects of downloads: the rules for following one, and the reasons against it.

use reqwest::redirect;

use super::address;

/// LIMIT: honest chains have one to three redirects.
const REDIRECTS_MAX: usize = 10;

/// Returns the redirect rules: at most ten, never from https to http, never to a link-local address.
pub fn redirects() -> redirect::Policy {
    redirect::Policy::custom(redirect)
}

fn redirect(attempt: redirect::Attempt) -> redirect::Action {
    let downgrade = attempt.previous().last().is_some_and(|from| from.scheme() == "https")
        && attempt.url().scheme() != "https";
    if attempt.previous().len() > REDIRECTS_MAX {
        attempt.error(Redirect::TooMany)
    } else if downgrade {
        attempt.error(Redirect::Downgrade)
    } else if address::forbidden_host(attempt.url()) {
        attempt.error(Redirect::Forbidden)
    } else {
        attempt.follow()
    }
}

/// The reason why a redirect is not followed.
#[derive(Debug, thiserror::Error)]
pub enum Redirect {
    /// A longer chain than `REDIRECTS_MAX`.
    #[error("it redirects more than {REDIRECTS_MAX} times")]
    TooMany,
    /// A redirect from https to http.
    #[error("it redirects from https to http, which is refused")]
    Downgrade,
    /// To a link-local address.
    #[error("it redirects to a link-local address, which is refused")]
    Forbidden,
}

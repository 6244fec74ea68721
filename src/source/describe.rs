//! Errors of the HTTP stack -> one sentence for a person, and whether a retry can help. The sentence never contains
//! a URL.

use std::error::Error;
use std::io;

use super::address;
use super::failure::Failure;
use super::options::Options;
use super::redirect::Redirect;
use crate::fault::Fault;

/// Most characters of foreign text in a message.
const FOREIGN_CHARS_MAX: usize = 200;

/// Describes an error of a request for `name`.
pub fn failure(error: &reqwest::Error, name: &str, options: &Options) -> Failure {
    if let Some(why) = find::<Redirect>(error) {
        return Fault::config(format!("{name}: {why}"))
            .help("give the final URL, to which it redirects")
            .into();
    }
    if find::<address::Forbidden>(error).is_some() {
        return Fault::config(format!("{name}: {}, which hone refuses", address::Forbidden)).into();
    }
    match find::<rustls::Error>(error) {
        Some(rustls::Error::InvalidCertificate(why)) => return untrusted(name, why),
        Some(why) => {
            return Failure::retry(format!("the TLS handshake failed ({})", printable(&why.to_string())));
        }
        None => (),
    }
    Failure::retry(cause(error, options))
}

fn cause(error: &reqwest::Error, options: &Options) -> String {
    let host = error.url().and_then(|url| url.host_str()).unwrap_or("the server");
    if error.is_timeout() {
        return match error.is_connect() {
            true => format!("no connection to {host} within {:?}", options.connect_timeout),
            false => format!("no data from {host} for {:?}", options.read_timeout),
        };
    }
    if error.is_dns() {
        return format!("the host name {host} cannot be resolved ({})", innermost(error));
    }
    match find::<io::Error>(error).map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionRefused) => format!("{host} refused the connection"),
        Some(io::ErrorKind::ConnectionReset) => format!("{host} reset the connection"),
        Some(io::ErrorKind::UnexpectedEof) => format!("{host} closed the connection too early"),
        _ => innermost(error),
    }
}

fn untrusted(name: &str, why: &rustls::CertificateError) -> Failure {
    use rustls::CertificateError as Certificate;
    let help = match why {
        Certificate::Expired | Certificate::ExpiredContext { .. } => "renew the server's certificate",
        Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
            "use the host name the certificate was made for"
        }
        _ => {
            "give the authority that signed it in ca_file or SSL_CERT_FILE; a bare image may contain no authorities"
        }
    };
    let why = printable(&rustls::Error::InvalidCertificate(why.clone()).to_string());
    Fault::config(format!("{name}: the server is not trusted: {why}")).help(help).into()
}

/// Returns the innermost error's text. The outer errors of reqwest and hyper only say "error sending request".
pub fn innermost(error: &reqwest::Error) -> String {
    printable(&chain(error).last().expect("a chain begins with its error").to_string())
}

/// Returns the text as one line of bounded length without control characters.
pub fn printable(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(FOREIGN_CHARS_MAX).collect()
}

fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    chain(error).find_map(|error| error.downcast_ref())
}

/// Returns an error and its causes.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| wrapped(error))
}

/// Returns the cause of an error. `io::Error::source` skips the error it wraps, so that one is asked for first.
fn wrapped<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_errors_are_found() {
        let inner = rustls::Error::DecryptError;
        let outer = io::Error::other(io::Error::other(inner.clone()));
        assert_eq!(find::<rustls::Error>(&outer), Some(&inner));
    }
}

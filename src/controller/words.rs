//! Messages of faults and of the API server -> one line of plain words, short enough for its place.

use crate::fault::Fault;
use crate::report::clean::clean;

/// Returns one line of at most so many bytes: line ends become spaces, other control characters visible.
pub fn plain(text: &str, bytes_max: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = clean(&line, bytes_max);
    if line.len() <= bytes_max {
        return line;
    }
    const CUT: char = '…';
    let mut end = bytes_max.saturating_sub(CUT.len_utf8());
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{CUT}", &line[..end])
}

/// Returns a fault with all its mistakes in one line: `2 mistakes: the first; the second`.
pub fn of_fault(fault: Fault) -> String {
    let mut lines = fault.message.lines().map(str::trim);
    let first = lines.next().unwrap_or_default().to_owned();
    let rest: Vec<&str> = lines.collect();
    let told = if rest.is_empty() { first } else { format!("{first}: {}", rest.join("; ")) };
    match fault.help {
        Some(help) => format!("{told}; {help}"),
        None => told,
    }
}

/// Returns an error of a request in plain words.
pub fn of_error(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => {
            format!("the API server answers {}: {}", status.code, status.message)
        }
        other => other.to_string(),
    }
}

/// Returns the reason why the API server refuses something permanently; `None`: it may accept it the next time.
pub fn refusal(error: &kube::Error) -> Option<String> {
    match error {
        kube::Error::Api(status) if matches!(status.code, 400 | 403 | 413 | 422) => {
            Some(status.message.clone())
        }
        _ => None,
    }
}

/// Returns whether the error says that the namespace is being deleted.
pub fn is_terminating(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 403 && status.message.contains("is being terminated"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_one_and_bytes_are_counted() {
        assert_eq!(plain("a\n  b\r\n\tc\u{1b}", 99), "a b c\\u{1b}");
        let long = plain(&"ö".repeat(900), 1024);
        assert!(long.len() <= 1024 && long.len() > 1020 && long.ends_with('…'), "{}", long.len());
        assert_eq!(plain("abc", 3), "abc");
    }

    #[test]
    fn mistakes_stand_in_one_line() {
        let fault = Fault::config("2 mistakes in the Workspace\n  a: b\n  c: d").help("look");
        assert_eq!(of_fault(fault), "2 mistakes in the Workspace: a: b; c: d; look");
        assert_eq!(of_fault(Fault::config("a: b")), "a: b");
    }
}

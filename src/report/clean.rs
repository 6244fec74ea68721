//! Text from datasets, registries and file names -> text that is safe on a terminal and on one line of a log.

/// Control characters become visible escapes, and so do the marks that reorder text: neither a terminal nor a
/// reader can be led astray by what a row or a server says. Longer texts are cut.
pub fn clean(text: &str, characters_max: usize) -> String {
    let mut cleaned = String::new();
    for (index, letter) in text.chars().enumerate() {
        if index == characters_max {
            cleaned.push('…');
            break;
        }
        match letter {
            '\t' => cleaned.push(' '),
            letter if letter.is_control() || reorders(letter) => cleaned.extend(letter.escape_default()),
            letter => cleaned.push(letter),
        }
    }
    cleaned
}

fn reorders(letter: char) -> bool {
    matches!(letter, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor() {
        assert_eq!(clean("a\u{1b}[2Jb\r\nc\u{9b}d", 99), "a\\u{1b}[2Jb\\r\\nc\\u{9b}d");
        assert_eq!(clean("file\u{202e}gpj.exe", 99), "file\\u{202e}gpj.exe");
        assert_eq!(clean("größe 数据 ok", 99), "größe 数据 ok");
        assert_eq!(clean("abcdef", 3), "abc…");
    }
}

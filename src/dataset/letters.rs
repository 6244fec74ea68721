//! Bytes <-> the letters that stand for them in the tokens of byte-level tokenizers, as GPT-2 defined them.

use std::sync::LazyLock;

/// Returns the byte of one of GPT-2's letters: printable bytes stand for themselves, the others are numbered from
/// U+0100 on.
pub(super) fn byte_of(letter: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(letter) {
        code @ 0..=0xff => u8::try_from(code).ok().filter(|byte| itself(*byte)),
        code => (0..=255).filter(|byte| !itself(*byte)).nth(code.checked_sub(0x100)? as usize),
    }
}

/// Returns the letter that stands for a byte in tokens: the inverse of `byte_of`.
pub(super) fn letter_of(byte: u8) -> char {
    static LETTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
        let mut letters = ['\0'; 256];
        for letter in ('\u{0}'..='\u{200}').filter(|letter| byte_of(*letter).is_some()) {
            letters[usize::from(byte_of(letter).unwrap_or_default())] = letter;
        }
        letters
    });
    LETTERS[usize::from(byte)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_letter() {
        for byte in 0..=255 {
            assert_eq!(byte_of(letter_of(byte)), Some(byte));
        }
        assert_eq!((letter_of(b' '), letter_of(b'a'), letter_of(b'\n')), ('Ġ', 'a', 'Ċ'));
    }
}

//! A token of a piece of text.

/// A token of a piece, with the bytes of the piece that it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Part {
    /// The token.
    pub id: u32,
    /// The place of its first byte.
    pub from: u32,
    /// The place behind its last byte.
    pub to: u32,
    /// Spaces that its text begins with.
    pub before: u16,
    /// Spaces that its text ends with.
    pub after: u16,
}

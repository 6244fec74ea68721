//! A token of a piece of text.

/// A token of a piece, with the bytes of the piece that it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Part {
    /// The token.
    pub id: u32,
    /// Where its bytes begin.
    pub from: u32,
    /// Where its bytes end.
    pub to: u32,
    /// Spaces that its text begins with.
    pub before: u16,
    /// Spaces that its text ends with.
    pub after: u16,
}

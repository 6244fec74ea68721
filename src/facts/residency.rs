//! `Residency`: the place of the frozen 4-bit weights of the layers while a model trains.

/// The place of the layers' 4-bit weights. Results have the same bits in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All of them in the device's memory.
    Resident,
    /// Each rank holds an equal piece of every layer. The pieces are gathered layer by layer.
    Shared,
    /// All of them in page-locked host memory. They are copied to the device layer by layer.
    Streamed,
}

impl Residency {
    /// All kinds, from the fastest to the slowest.
    pub const ALL: [Residency; 3] = [Residency::Resident, Residency::Shared, Residency::Streamed];

    /// Returns the name that the key `residency` and printed tables use.
    pub fn name(self) -> &'static str {
        match self {
            Residency::Resident => "resident",
            Residency::Shared => "shared",
            Residency::Streamed => "streamed",
        }
    }

    /// Returns the kind of that name.
    pub fn named(name: &str) -> Option<Residency> {
        Residency::ALL.into_iter().find(|residency| residency.name() == name)
    }
}

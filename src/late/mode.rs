//! When the guest starts at the destination.
use std::fmt;

use serde::Deserialize;

/// How a guest is migrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It starts when all of its memory is there.
    #[default]
    Precopy,
    /// Its memory is sent while it runs; what is still missing when it is suspended follows when it runs again.
    Hybrid,
    /// It is suspended at once, and nearly all of its memory follows.
    Postcopy,
}

impl Mode {
    /// `None`: no mode has this name.
    pub fn named(name: &str) -> Option<Mode> {
        [Mode::Precopy, Mode::Hybrid, Mode::Postcopy]
            .into_iter()
            .find(|mode| mode.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Mode::Precopy => "precopy",
            Mode::Hybrid => "hybrid",
            Mode::Postcopy => "postcopy",
        }
    }

    /// Whether pages may follow the guest.
    pub fn leaves_pages(self) -> bool {
        self != Mode::Precopy
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

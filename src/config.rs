//! `/etc/xen/xenfold.conf`: TOML: settings, and a table `[group]`; booleans may be 0 or 1, as in xl.conf. Agents and daemon read the
//! same file.
use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::late::Mode;

/// Where the configuration is read from.
pub const PATH: &str = "/etc/xen/xenfold.conf";

/// Names of groups that a guest forms alone begin with this; its UUID follows.
pub const ALONE: &str = "guest-";

/// Longest name of a group: the daemon's store names folders after groups.
const GROUP_NAME_BYTES: usize = 64;

/// Settings of the migration agents, which command-line options override, and of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Read every frame of the rebuilt guest back before it may start.
    #[serde(deserialize_with = "boolean")]
    pub verify: bool,
    /// Send as plain xl does when the other host has no xenfold.
    #[serde(deserialize_with = "boolean")]
    pub fallback: bool,
    /// Where to write the figures of each migration.
    pub stats: Option<PathBuf>,
    /// Seconds of silence after which the other host is given up.
    #[serde(deserialize_with = "timeout")]
    pub timeout: u32,
    /// No lines of progress, no summary.
    #[serde(deserialize_with = "boolean")]
    pub quiet: bool,
    /// The ssh to run.
    pub ssh: String,
    /// Milliseconds for which a guest may stand still.
    #[serde(deserialize_with = "downtime_limit")]
    pub downtime_limit: u32,
    /// What becomes of a guest that would stand still longer.
    pub on_no_convergence: NoConvergence,
    /// Rounds for which xl is held at the end of its passes while pages go ahead of it; 0: it is never held.
    #[serde(deserialize_with = "max_iterations")]
    pub max_iterations: u32,
    /// Seconds after which xl is held no longer; 0: there is no limit.
    #[serde(deserialize_with = "max_time")]
    pub max_time: u32,
    /// Bytes a second that a migration may take of the link; 0 means all it can get.
    pub bandwidth: Size,
    /// Before it is migrated a guest gives up what it does not use, but stays at least so large; 0: it keeps its size.
    pub balloon: Size,
    /// Hold pages back that will be written again.
    #[serde(deserialize_with = "boolean")]
    pub hold: bool,
    /// Send each content once; otherwise every page that is not zero.
    #[serde(deserialize_with = "boolean")]
    pub dedup: bool,
    /// When the guest starts at the destination.
    pub mode: Mode,
    /// Seconds for which the guest's writes are watched before its migration begins.
    #[serde(deserialize_with = "model_seconds")]
    pub model_seconds: u32,
    /// Daemon: the folder of its contents and keys.
    pub store: PathBuf,
    /// Daemon: what contents may take on the disk; 0 means none are kept.
    pub store_size: Size,
    /// Daemon: whether contents that several guests of a group have had become a template.
    #[serde(deserialize_with = "boolean")]
    pub auto_template: bool,
    /// Daemon: whether contents of running guests are looked up.
    #[serde(deserialize_with = "boolean")]
    pub index: bool,
    /// Daemon: what the index may take of memory; 0 means there is none.
    pub index_size: Size,
    /// Daemon: the most pages a second that are hashed for the index.
    #[serde(deserialize_with = "index_rate")]
    pub index_rate: u32,
    /// Daemon: the most of a processor's time that goes into it, in percent; 0: whatever it takes.
    #[serde(deserialize_with = "index_processor")]
    pub index_processor: u32,
    /// Daemon: guests whose contents are not looked up.
    pub index_off: Patterns,
    /// Daemon: whether equal pages of running guests get one frame.
    #[serde(deserialize_with = "boolean")]
    pub sharing: bool,
    /// Daemon: free memory of the host below which nothing further is shared.
    pub sharing_reserve: Size,
    /// Daemon: the socket on which it tells its figures, if any.
    #[serde(deserialize_with = "socket")]
    pub metrics: Option<PathBuf>,
    /// Which guests share contents.
    pub group: Groups,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            verify: false,
            fallback: true,
            stats: None,
            timeout: 15,
            quiet: false,
            ssh: "ssh".into(),
            downtime_limit: 300,
            on_no_convergence: NoConvergence::GoOn,
            max_iterations: 30,
            max_time: 0,
            bandwidth: Size(0),
            balloon: Size(0),
            hold: true,
            dedup: true,
            mode: Mode::Precopy,
            model_seconds: 2,
            store: "/var/lib/xenfold".into(),
            store_size: Size(4 << 30),
            auto_template: true,
            index: true,
            index_size: Size(256 << 20),
            index_rate: 20_000,
            index_processor: 25,
            index_off: Patterns::default(),
            sharing: false,
            sharing_reserve: Size(256 << 20),
            metrics: None,
            group: Groups::default(),
        }
    }
}

fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Boolean {
        Bool(bool),
        Number(u8),
    }
    match Boolean::deserialize(deserializer) {
        Ok(Boolean::Bool(value)) => Ok(value),
        Ok(Boolean::Number(value @ (0 | 1))) => Ok(value == 1),
        _ => Err(D::Error::custom("expected true, false, 0 or 1")),
    }
}

fn timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let seconds = i64::deserialize(deserializer)?;
    u32::try_from(seconds)
        .ok()
        .filter(|seconds| (1..=3600).contains(seconds))
        .ok_or_else(|| D::Error::custom(format!("timeout is {seconds} seconds, and must be 1 to 3600")))
}

/// What becomes of a guest that writes faster than the link takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoConvergence {
    /// It is suspended all the same, as plain xl does.
    #[default]
    GoOn,
    /// It stays where it is.
    Abort,
}

/// A day: more is a mistake.
pub const MAX_DOWNTIME_MS: u32 = 86_400_000;

fn downtime_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let ms = i64::deserialize(deserializer)?;
    u32::try_from(ms)
        .ok()
        .filter(|ms| (1..=MAX_DOWNTIME_MS).contains(ms))
        .ok_or_else(|| D::Error::custom(format!("downtime_limit is {ms} ms, and must be 1 to {MAX_DOWNTIME_MS}")))
}

/// More rounds and more time than that are a mistake.
pub const MAX_ITERATIONS: u32 = 10_000;
pub const MAX_TIME_S: u32 = 86_400;

fn max_iterations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    up_to("max_iterations", MAX_ITERATIONS, i64::deserialize(deserializer)?)
}

fn max_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    up_to("max_time", MAX_TIME_S, i64::deserialize(deserializer)?)
}

fn up_to<E: serde::de::Error>(key: &str, most: u32, number: i64) -> Result<u32, E> {
    let fits = u32::try_from(number).ok().filter(|number| *number <= most);
    fits.ok_or_else(|| E::custom(format!("{key} is {number}, and must be 0 to {most}")))
}

/// So many samples as a model takes, one each 50 ms (`MOST_SAMPLES` in policy/model.rs).
const MAX_MODEL_SECONDS: u32 = 12;

fn model_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    up_to("model_seconds", MAX_MODEL_SECONDS, i64::deserialize(deserializer)?)
}

/// A rate at which no host hashes; more is a mistake.
const MAX_INDEX_RATE: u32 = 100_000_000;

fn index_rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let rate = i64::deserialize(deserializer)?;
    u32::try_from(rate)
        .ok()
        .filter(|rate| (1..=MAX_INDEX_RATE).contains(rate))
        .ok_or_else(|| {
            D::Error::custom(format!(
                "index_rate is {rate} pages a second, and must be 1 to {MAX_INDEX_RATE}; index = false turns it off"
            ))
        })
}

/// It is one thread.
const MAX_INDEX_PROCESSOR: u32 = 100;

fn index_processor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    up_to("index_processor", MAX_INDEX_PROCESSOR, i64::deserialize(deserializer)?)
}

/// The longest name of a socket that every system takes (sun_path in sockaddr_un, with its NUL).
const MAX_SOCKET_BYTES: usize = 107;

fn socket<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if !path.is_absolute() || path.as_os_str().len() > MAX_SOCKET_BYTES {
        return Err(D::Error::custom(format!(
            "metrics is {path:?}, and must be the whole path of a socket, like \"/run/xenfold/metrics.sock\", of at most \
             {MAX_SOCKET_BYTES} bytes"
        )));
    }
    Ok(Some(path))
}

/// Names of guests, with `*` and `?` as in a shell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// Whether one of them is the guest's name (its own, without xl's suffixes).
    pub fn fit(&self, guest: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern, guest))
    }
}

/// A size in bytes, written like `"8GiB"`; 0 needs no unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size(u64);

impl Size {
    pub const fn new(bytes: u64) -> Size {
        Size(bytes)
    }

    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// `None`: no whole number followed by KiB, MiB, GiB or TiB, or too large.
    fn parse(text: &str) -> Option<Size> {
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let number: u64 = digits.parse().ok()?;
        let shift = match text.strip_prefix(digits)?.trim_start() {
            "" if number == 0 => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift).map(Size)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(i64),
        }
        let size = match Written::deserialize(deserializer) {
            Ok(Written::Text(text)) => Size::parse(&text),
            // A bare number does not say of what.
            Ok(Written::Number(0)) => Some(Size(0)),
            _ => None,
        };
        size.ok_or_else(|| D::Error::custom("expected a size like \"8GiB\" (KiB, MiB, GiB, TiB), or 0"))
    }
}

impl fmt::Display for Size {
    /// In the largest unit that leaves a whole number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units
            .iter()
            .find(|(shift, _)| self.0 != 0 && self.0.trailing_zeros() >= *shift)
        {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Sharing groups: the names of the guests in each, with `*` and `?` as in a shell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Groups(BTreeMap<GroupName, Patterns>);

/// Letters, digits, '.', '_', '-'; not like the name of a guest's own group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct GroupName(String);

impl<'de> Deserialize<'de> for GroupName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GroupName, D::Error> {
        let name = String::deserialize(deserializer)?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let length = 1..=GROUP_NAME_BYTES;
        if !length.contains(&name.len()) || !name.bytes().all(allowed) || name.starts_with('.') {
            return Err(D::Error::custom(format!(
                "{name:?} is no name for a group: letters, digits, '.', '_', '-', at most {GROUP_NAME_BYTES} of them, \
                 the first not '.'"
            )));
        }
        if name.starts_with(ALONE) {
            return Err(D::Error::custom(format!(
                "no group may be called {name:?}: {ALONE}UUID is the group of a guest alone"
            )));
        }
        Ok(GroupName(name))
    }
}

/// A guest cannot share with two groups.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("guest {guest} matches two groups in the configuration, {first} and {second}; it can be in one only")]
pub struct TwoGroups {
    pub guest: String,
    pub first: String,
    pub second: String,
}

impl Groups {
    /// The group of the guest with this name (its own, without xl's suffixes); `None`: it shares with nobody.
    pub fn of(&self, guest: &str) -> Result<Option<&str>, TwoGroups> {
        let mut found = self.0.iter().filter(|(_, patterns)| patterns.fit(guest));
        match (found.next(), found.next()) {
            (Some((first, _)), Some((second, _))) => Err(TwoGroups {
                guest: guest.into(),
                first: first.0.clone(),
                second: second.0.clone(),
            }),
            (found, _) => Ok(found.map(|(name, _)| name.0.as_str())),
        }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(|name| name.0.as_str())
    }
}

/// Whether a shell would take `name` for `pattern`: `*` is any text, `?` any one character. No backtracking beyond the
/// last `*`, so the time is at most the product of the lengths.
fn matches(pattern: &str, name: &str) -> bool {
    let (mut pattern, mut name) = (pattern.chars(), name.chars());
    let mut retry = None;
    loop {
        let at_name = name.clone();
        match (pattern.next(), name.next()) {
            (None, None) => return true,
            (Some('*'), _) => {
                // The name is tried again from each later character when what follows the `*` does not match.
                name = at_name.clone();
                retry = Some((pattern.clone(), at_name));
            }
            (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {}
            _ => {
                let Some((from, mut rest)) = retry.take() else {
                    return false;
                };
                if rest.next().is_none() {
                    return false;
                }
                pattern = from.clone();
                name = rest.clone();
                retry = Some((from, rest));
            }
        }
    }
}

/// Why the configuration cannot be used. Nothing is started with half of one.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("{path} cannot be read")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid: {message}")]
    Invalid { path: PathBuf, message: String },
}

/// Reads the configuration; an absent file means the defaults.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Config::default()),
        Err(source) => {
            return Err(ConfigError::Unreadable {
                path: path.into(),
                source,
            });
        }
    };
    toml::from_str(&text).map_err(|error| ConfigError::Invalid {
        path: path.into(),
        message: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn settings_are_read() {
        let config = parsed("verify = 1\nfallback = false\ntimeout = 30\n").unwrap();
        assert_eq!(
            config,
            Config {
                verify: true,
                fallback: false,
                timeout: 30,
                ..Config::default()
            }
        );
        assert_eq!(read(Path::new("/nonexistent/xenfold.conf")).unwrap(), Config::default());
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let error = parsed("verify = 1\nverfy = 1\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("verfy"), "{error}");
        assert!(parsed("verify = 2").unwrap_err().to_string().contains("line 1"));
        assert!(parsed("timeout = 0").unwrap_err().to_string().contains("1 to 3600"));
        for (text, says) in [
            ("\nstore_size = 8", "8GiB"),
            ("\nstore_size = \"8GB\"", "8GiB"),
            ("\nstore_size = \"99999999TiB\"", "8GiB"),
            ("\ntimeout = 4000", "1 to 3600"),
            ("\nmodel_seconds = 13", "0 to 12"),
            ("\nhold = 2", "0 or 1"),
            ("\ndowntime_limit = 0", "1 to 86400000"),
            ("\non_no_convergence = \"stop\"", "go-on"),
            ("\nmode = \"live\"", "postcopy"),
            ("\nmax_iterations = -1", "0 to 10000"),
            ("\nmax_time = 86401", "0 to 86400"),
            ("\nbandwidth = 10", "MiB"),
            ("\nballoon = true", "MiB"),
            ("\nindex_rate = 0", "index = false"),
            ("\nindex_processor = 101", "must be 0 to 100"),
            ("\nindex_size = 8", "8GiB"),
            ("\nindex_off = \"web\"", "sequence"),
            ("\nindex_of = []", "index_off"),
            ("\nmetrics = \"run/metrics\"", "/run/xenfold/metrics.sock"),
            ("\nmetrics = 9100", "string"),
            ("[group]\n\"a/b\" = [\"web\"]", "no name for a group"),
            ("[group]\nguest-1 = [\"web\"]", "a guest alone"),
            ("[group]\nweb = \"web-*\"", "sequence"),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_have_units() {
        let size = |text: &str| parsed(&format!("store_size = {text}")).unwrap().store_size;
        assert_eq!(size("\"8GiB\"").bytes(), 8 << 30);
        assert_eq!(size("\"512 MiB\"").bytes(), 512 << 20);
        assert_eq!((size("0").bytes(), size("\"0\"").bytes()), (0, 0));
        assert_eq!(Size(4 << 30).to_string(), "4GiB");
        assert_eq!(Size(1).to_string(), "1 bytes");
    }

    #[test]
    fn guests_are_left_out_of_the_index() {
        let config =
            parsed("index = 0\nindex_rate = 500\nindex_processor = 5\nindex_size = \"1GiB\"\nindex_off = [\"db-*\"]")
                .unwrap();
        assert_eq!(
            (config.index, config.index_rate, config.index_processor),
            (false, 500, 5)
        );
        assert_eq!(config.index_size, Size::new(1 << 30));
        assert!(config.index_off.fit("db-1") && !config.index_off.fit("web-1"));
        assert!(!Config::default().index_off.fit("") && !Config::default().sharing);
        let config = parsed("sharing = 1\nsharing_reserve = \"64MiB\"").unwrap();
        assert_eq!((config.sharing, config.sharing_reserve), (true, Size::new(64 << 20)));
        let metrics = parsed("metrics = \"/run/m.sock\"").unwrap().metrics;
        assert_eq!(metrics.as_deref(), Some(Path::new("/run/m.sock")));
        assert!(parsed(&format!("metrics = \"/{}\"", "m".repeat(MAX_SOCKET_BYTES))).is_err());
    }

    #[test]
    fn a_guest_is_in_one_group() {
        let config = parsed("[group]\nweb = [\"web-*\", \"www\"]\nall-2 = [\"*2\"]\n").unwrap();
        assert_eq!(config.group.of("web-1").unwrap(), Some("web"));
        assert_eq!(config.group.of("www").unwrap(), Some("web"));
        assert_eq!(config.group.of("database").unwrap(), None);
        let error = config.group.of("web-2").unwrap_err().to_string();
        assert!(error.contains("web") && error.contains("all-2"), "{error}");
    }

    #[test]
    fn patterns_are_a_shells() {
        for (pattern, name, expected) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("*c", "abcd", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*ab*b", "aabab", true),
            ("*ab*c", "aabab", false),
            ("?", "ü", true),
            ("[a]", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        let (pattern, name) = ("a*".repeat(200) + "b", "a".repeat(2000));
        assert!(!matches(&pattern, &name));
    }
}

//! `/etc/xen/xenfold.conf`: flat TOML; booleans may be 0 or 1, as in xl.conf.
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use thiserror::Error;

/// Where the configuration is read from.
pub const PATH: &str = "/etc/xen/xenfold.conf";

/// Settings of the migration agents. Command-line options override them.
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
    pub timeout: u32,
    /// No lines of progress, no summary.
    #[serde(deserialize_with = "boolean")]
    pub quiet: bool,
    /// The ssh to run.
    pub ssh: String,
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
        _ => Err(serde::de::Error::custom("expected true, false, 0 or 1")),
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
    let invalid = |message| ConfigError::Invalid {
        path: path.into(),
        message,
    };
    let config: Config = toml::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    if !(1..=3600).contains(&config.timeout) {
        return Err(invalid(format!(
            "timeout is {} seconds, and must be 1 to 3600",
            config.timeout
        )));
    }
    Ok(config)
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
    }
}

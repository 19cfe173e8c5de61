//! The configuration file that the package installs says what the program does.
use std::path::PathBuf;

use xenfold::config::{self, Config};
use xenfold_plugin::arguments::USAGE;

#[test]
fn the_shipped_configuration_shows_every_key_and_its_default() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/debian/xenfold.conf");
    let shipped = config::read(path.as_ref()).unwrap();
    assert_eq!(shipped, Config::default(), "as installed it changes nothing");

    let text = std::fs::read_to_string(path).unwrap();
    let settings: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| !line.starts_with(' '))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), settings.join("\n")).unwrap();
    let uncommented = config::read(file.path()).unwrap();
    let stats = Some(PathBuf::from("/var/log/xen/xenfold.json"));
    assert_eq!(
        uncommented,
        Config {
            stats,
            ..Config::default()
        }
    );

    let keys: Vec<&str> = settings
        .iter()
        .filter_map(|line| line.split(" = ").next())
        .filter(|key| !key.is_empty())
        .collect();
    let (_, named) = USAGE.rsplit_once("for every migration: ").unwrap();
    assert_eq!(keys.join(", "), named.trim_end_matches('.'));
}

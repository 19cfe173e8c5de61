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
    let metrics = Some(PathBuf::from("/run/xenfold/metrics.sock"));
    assert_eq!(
        uncommented.group.of("web-1").unwrap(),
        Some("web"),
        "the example is one"
    );
    assert_eq!(
        uncommented,
        Config {
            stats,
            metrics,
            group: uncommented.group.clone(),
            ..Config::default()
        }
    );

    let keys: Vec<&str> = settings
        .iter()
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(" = ").next())
        .filter(|key| !key.is_empty())
        .collect();
    let (_, named) = USAGE.rsplit_once("for every migration: ").unwrap();
    let agents = named.trim_end_matches('.').replace('\n', " ");
    assert_eq!(
        keys.join(", "),
        format!(
            "{agents}, store, store_size, auto_template, index, index_size, index_rate, index_processor, index_off, sharing, \
             sharing_reserve, metrics"
        )
    );
}

#[test]
fn no_key_is_missing_in_the_shipped_configuration() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/debian/xenfold.conf");
    let text = std::fs::read_to_string(path).unwrap();
    // An unknown key's error lists those that there are.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "nonsense = 1").unwrap();
    let error = config::read(file.path()).unwrap_err().to_string();
    let (_, expected) = error.split_once("expected one of ").unwrap();
    let keys: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    assert!(keys.len() > 8, "{error}");
    for key in keys {
        let there = text.contains(&format!("\n#{key} = ")) || text.contains(&format!("\n#[{key}]\n"));
        assert!(there, "{key} is not in {path}");
    }
}

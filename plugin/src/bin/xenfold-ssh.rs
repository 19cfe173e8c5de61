//! `xl migrate -s xenfold-ssh GUEST HOST`: speaks like ssh, carries the guest through xenfold.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::exit;

use xenfold::config;
use xenfold_plugin::arguments::{self, Action, ArgumentError, USAGE};
use xenfold_plugin::{say, source};

fn main() {
    xen_sys::keep_freed_memory();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp_millis()
        .init();
    let config = config::read(Path::new(config::PATH)).unwrap_or_else(|error| {
        say!("xenfold: {error}. The guest is untouched and runs on here; mend the file, then type the same command again.");
        exit(1)
    });
    match arguments::parse(config, std::env::args().skip(1)) {
        Ok(Action::Help) => println!("{USAGE}"),
        Ok(Action::Version) => println!("xenfold-ssh {}", xenfold::VERSION),
        Ok(Action::Migrate(arguments)) => match source::run(&arguments) {
            // Threads that wait for what does not come any more end with the process.
            Ok(status) => exit(status),
            Err(error) => {
                say!("xenfold: {error:#}. The guest is this host's.");
                exit(1)
            }
        },
        Err(error @ ArgumentError::NoCommand) => {
            say!("xenfold: {error}\n{USAGE}");
            exit(1)
        }
        Err(error) => {
            say!(
                "xenfold: {error}. The guest is untouched and runs on here; mend the option (xenfold-ssh --help), then try again."
            );
            exit(1)
        }
    }
}

//! xenfoldd, the dom0 service. Not built yet: migrations work without it, and this program says so and stops.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "xenfoldd {}: the daemon is not implemented in this version; `xl migrate -s xenfold-ssh` works without it",
        xenfold::VERSION
    );
    ExitCode::from(69)
}

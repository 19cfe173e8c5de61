//! Xen's own checker of streams.
use std::io::Write;
use std::path::Path;
use std::process::Command;

pub struct Oracle {
    script: String,
    library: String,
}

/// `XENFOLD_VERIFY_STREAM` is the path of `verify-stream-v2` (Debian: package xen-utils-4.17, /usr/lib/xen-4.17/bin), its
/// Python library is found beside it or through `PYTHONPATH`. Without it the test is skipped, loudly; where
/// `XENFOLD_REQUIRE_ORACLES=1` it fails.
pub fn find() -> Option<Oracle> {
    let Ok(script) = std::env::var("XENFOLD_VERIFY_STREAM") else {
        let required = std::env::var("XENFOLD_REQUIRE_ORACLES").is_ok_and(|value| value == "1");
        assert!(
            !required,
            "XENFOLD_REQUIRE_ORACLES=1, but XENFOLD_VERIFY_STREAM does not name verify-stream-v2"
        );
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: XENFOLD_VERIFY_STREAM does not name Xen's verify-stream-v2; streams are NOT checked by it"
        );
        return None;
    };
    let library = std::env::var("PYTHONPATH").unwrap_or_else(|_| {
        let bin = Path::new(&script).parent().expect("a path with a directory");
        bin.join("../lib/python").to_string_lossy().into_owned()
    });
    Some(Oracle { script, library })
}

impl Oracle {
    /// Checks a stream that starts with libxl's header.
    pub fn check(&self, stream: &[u8]) -> Result<(), String> {
        let mut file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
        file.write_all(stream).map_err(|error| error.to_string())?;
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &self.library).arg(&self.script);
        command.args(["-f", "libxl", "-i"]).arg(file.path());
        let output = command.output().map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(())
        } else {
            Err(format!("{}: {said}", output.status))
        }
    }
}

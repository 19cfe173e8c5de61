//! Stamps the build: `XENFOLD_BUILD` is the commit the binaries were made from, or "unknown" outside a checkout.
use std::process::Command;

fn main() {
    // HEAD names a branch; its log changes with each commit.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    println!(
        "cargo:rustc-env=XENFOLD_BUILD={}",
        commit.as_deref().unwrap_or("unknown")
    );
}

fn git(words: &[&str]) -> Option<String> {
    let out = Command::new("git").args(words).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    out.status.success().then(|| text.trim().to_owned())
}

//! The libraries: which file, opened once, and how a function in it is reached.
//!
//! A library that has been opened stays open until the process ends. libxenctrl leaves thread-specific data with a
//! destructor behind and libxl an atfork handler: unloading them under a living thread would be a jump into nothing.
use std::ffi::CString;
use std::io;
use std::sync::OnceLock;

use crate::{BUILT_FOR, XenError, running_version};

#[allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unused_imports,
    missing_docs,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

pub(crate) use bindings::{
    XEN_VERSION, ctrl, devicemodel, evtchn, foreignmemory, light, store, toollog, xentoollog_logger,
};

/// A library's functions, by soname.
macro_rules! library {
    ($function:ident, $loader:ty, $soname:expr, $package:expr) => {
        /// The library, opened by the first caller that succeeds.
        pub(crate) fn $function() -> Result<&'static $loader, XenError> {
            static OPENED: OnceLock<$loader> = OnceLock::new();
            if let Some(library) = OPENED.get() {
                return Ok(library);
            }
            let name: String = $soname;
            // SAFETY: loading runs the initialisers of a Xen library under its full soname; they set up that library's own
            // data only. Its functions have the types that bindgen read from the headers of the same soname.
            match unsafe { <$loader>::new(&name) } {
                // Two threads may both get here; the loser's handle is dropped, the winner's reference keeps the library.
                Ok(library) => Ok(OPENED.get_or_init(|| library)),
                Err(error) => Err(missing(name, $package, error)),
            }
        }
    };
}

library!(
    toollog,
    toollog::ToollogLib,
    "libxentoollog.so.1".into(),
    "libxentoollog1".into()
);
library!(
    ctrl,
    ctrl::CtrlLib,
    format!("libxenctrl.so.{BUILT_FOR}"),
    format!("libxenmisc{BUILT_FOR}")
);
library!(
    foreignmemory,
    foreignmemory::ForeignmemoryLib,
    "libxenforeignmemory.so.1".into(),
    "libxenforeignmemory1".into()
);
library!(
    devicemodel,
    devicemodel::DevicemodelLib,
    "libxendevicemodel.so.1".into(),
    "libxendevicemodel1".into()
);
library!(
    evtchn,
    evtchn::EvtchnLib,
    "libxenevtchn.so.1".into(),
    "libxenevtchn1".into()
);
library!(store, store::StoreLib, "libxenstore.so.4".into(), "libxenstore4".into());
library!(
    light,
    light::LightLib,
    format!("libxenlight.so.{BUILT_FOR}"),
    format!("libxenmisc{BUILT_FOR}")
);

fn missing(name: String, package: String, error: libloading::Error) -> XenError {
    // The libraries of another release are installed: their package is not what the administrator needs.
    match running_version() {
        Some(running) if running != BUILT_FOR && name.ends_with(&BUILT_FOR.to_string()) => XenError::VersionMismatch {
            built: BUILT_FOR,
            running,
        },
        _ => XenError::LibraryMissing {
            name,
            package,
            source: Box::new(error),
        },
    }
}

/// The function `$name` of an opened library, or a return with [`XenError::SymbolMissing`]. bindgen's own methods would
/// panic for one that is missing.
macro_rules! symbol {
    ($library:expr, $name:ident) => {
        match &$library.$name {
            Ok(function) => *function,
            Err(_) => {
                let error = $crate::XenError::SymbolMissing {
                    library: $crate::ffi::library_of(&$library).to_string(),
                    symbol: stringify!($name),
                };
                return Err(error.into());
            }
        }
    };
}
pub(crate) use symbol;

/// The library's name for messages: from its loader type, so that it cannot be given wrong.
pub(crate) fn library_of<T>(_: &T) -> &'static str {
    let name = std::any::type_name::<T>();
    [
        ("Toollog", "libxentoollog"),
        ("Ctrl", "libxenctrl"),
        ("Foreignmemory", "libxenforeignmemory"),
        ("Devicemodel", "libxendevicemodel"),
        ("Evtchn", "libxenevtchn"),
        ("Store", "libxenstore"),
        ("Light", "libxenlight"),
    ]
    .into_iter()
    .find(|(part, _)| name.contains(&format!("::{part}Lib")))
    .map_or("a Xen library", |(_, library)| library)
}

/// errno as it stands. To be called before anything else that could change it.
pub(crate) fn errno() -> io::Error {
    io::Error::last_os_error()
}

/// A string for C.
pub(crate) fn c_string(what: &'static str, text: &str) -> Result<CString, XenError> {
    CString::new(text).map_err(|_| XenError::Argument {
        what,
        reason: "a NUL byte in a string",
    })
}

unsafe extern "C" {
    /// glibc's stream. xtl writes its lines to it whole and flushes, so they do not mix with Rust's unbuffered stderr.
    static stderr: *mut libc::FILE;
}

/// A libxentoollog logger on stderr; what a library has to say about its own failures.
pub(crate) struct Logger {
    library: &'static toollog::ToollogLib,
    logger: *mut xentoollog_logger,
}

// SAFETY: the logger is heap data of libxentoollog without ties to a thread.
unsafe impl Send for Logger {}
// SAFETY: its only state that changes after creation belongs to progress messages, which are off
// (XTL_STDIOSTREAM_HIDE_PROGRESS, `xtl_logger_stdio.c`); the FILE locks itself.
unsafe impl Sync for Logger {}

impl Logger {
    /// A logger that shows `level` (XTL_*) and what is worse.
    pub(crate) fn new(level: toollog::xentoollog_level) -> Result<Self, XenError> {
        let library = toollog()?;
        let create = symbol!(library, xtl_createlogger_stdiostream);
        // SAFETY: `stderr` is initialised by libc before main and never reassigned by us; the other arguments are numbers.
        let logger = unsafe { create(stderr, level, toollog::XTL_STDIOSTREAM_HIDE_PROGRESS) };
        if logger.is_null() {
            let source = errno();
            return Err(XenError::call("xtl_createlogger_stdiostream", None, source));
        }
        Ok(Logger {
            library,
            logger: logger.cast(),
        })
    }

    /// For libraries whose failing calls we return as errors: silent, but with debug logging on all they have to say.
    pub(crate) fn quiet() -> Result<Self, XenError> {
        let debug = log::max_level() >= log::LevelFilter::Debug;
        Logger::new(if debug {
            toollog::XTL_DEBUG
        } else {
            toollog::XTL_CRITICAL
        })
    }

    /// For libxl, whose codes say little: its warnings and errors are shown.
    pub(crate) fn warnings() -> Result<Self, XenError> {
        let debug = log::max_level() >= log::LevelFilter::Debug;
        Logger::new(if debug { toollog::XTL_DEBUG } else { toollog::XTL_WARN })
    }

    pub(crate) fn as_ptr(&self) -> *mut xentoollog_logger {
        self.logger
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Ok(destroy) = &self.library.xtl_logger_destroy {
            // SAFETY: made by xtl_createlogger_stdiostream and destroyed once; whoever was given the pointer holds the
            // Logger in a field that is dropped after its own close.
            unsafe { destroy(self.logger) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says when the committed bindings are not what the headers here give. Different bindgen or libclang releases may
    /// print differently, so it is an error only where the bindings are required to be generated (CI).
    #[test]
    fn committed_bindings_are_current() {
        let generated = include_str!(concat!(env!("OUT_DIR"), "/bindings.rs"));
        let committed = include_str!("bindings/xen-4.17.rs");
        if env!("XEN_SYS_BINDINGS") != "generated" {
            eprintln!("SKIPPED: the bindings in use are the committed ones; nothing to compare with");
            return;
        }
        if XEN_VERSION != (4, 17) {
            eprintln!("SKIPPED: the headers here are Xen {BUILT_FOR}, the committed bindings are for 4.17");
            return;
        }
        if generated != committed {
            let advice = concat!(
                "xen-sys/src/bindings/xen-4.17.rs differs from what bindgen makes of the headers here; update it: cp ",
                env!("OUT_DIR"),
                "/bindings.rs xen-sys/src/bindings/xen-4.17.rs"
            );
            let required =
                std::env::var("XENFOLD_REQUIRE_BINDGEN").is_ok_and(|value| !value.is_empty() && value != "0");
            assert!(!required, "{advice}");
            eprintln!("WARNING: {advice}");
        }
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_library_and_package() {
        // SAFETY: there is no such file, so nothing is loaded.
        let error = unsafe { ctrl::CtrlLib::new("libxenctrl.so.0.0") }
            .err()
            .expect("no such library");
        let error = missing("libxenctrl.so.0.0".into(), "libxenmisc0.0".into(), error);
        let text = error.to_string();
        assert!(
            text.contains("libxenctrl.so.0.0") && text.contains("libxenmisc0.0"),
            "{text}"
        );
        let cause = std::error::Error::source(&error)
            .expect("the loader's words")
            .to_string();
        assert!(!cause.is_empty());
    }
}

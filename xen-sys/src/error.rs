//! What can go wrong between us and Xen.
use std::fmt;
use std::io;

use crate::DomId;

/// A Xen release. Patch levels do not change an ABI and are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XenVersion {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for XenVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// An error from Xen or its libraries. Each message says what to do next where there is something to do; the cause
/// underneath is `source()` and is not repeated in the message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XenError {
    /// A shared library is not installed: this is no Xen dom0, or a dom0 without its tools.
    #[error("cannot load {name}: install the package {package} (Debian's name), or run this in a Xen dom0")]
    LibraryMissing {
        name: String,
        package: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The library is there and lacks a function: not the library that its soname promises.
    #[error("{library} has no function {symbol}")]
    SymbolMissing { library: String, symbol: &'static str },
    /// The hypervisor that runs is another release than the one this program was built for.
    #[error(
        "this program was built for Xen {built} and the hypervisor is Xen {running}: install the build for Xen {running} \
         (after an upgrade of Xen's packages, reboot)"
    )]
    VersionMismatch { built: XenVersion, running: XenVersion },
    /// The library is there and could not reach its driver or daemon: no dom0, not root, xenstored not running.
    #[error("cannot open {what}: this needs root in a running Xen dom0")]
    Unavailable {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// The domain does not exist (any more).
    #[error("there is no domain {0}")]
    NoSuchDomain(DomId),
    /// XEN_DOMCTL_SHADOW_OP_ENABLE answered EINVAL (`xen/arch/x86/mm/paging.c`).
    #[error(
        "cannot turn log-dirty on for {domid}: a migration or save of it is under way, or it has a passed-through device"
    )]
    LogDirtyRefused {
        domid: DomId,
        #[source]
        source: io::Error,
    },
    /// [`crate::LogDirty::clean`] without a successful [`crate::LogDirty::enable`] before it.
    #[error("log-dirty of {0} is not ours: cleaning it would lose another reader's pages")]
    LogDirtyNotOurs(DomId),
    /// A call failed; `what` is the C function or operation.
    #[error("{what}{} failed", OfDomain(.domid))]
    Call {
        what: &'static str,
        domid: Option<DomId>,
        #[source]
        source: io::Error,
    },
    /// libxl answered with an error code of its own (`enum libxl_error`); it has written the details to stderr.
    #[error("{what}{} failed: {} ({code})", OfDomain(.domid), libxl_error_name(*.code))]
    Libxl {
        what: &'static str,
        domid: Option<DomId>,
        code: i32,
    },
    /// An argument that C cannot take: a NUL byte in a string, or a number out of range.
    #[error("{what}: {reason}")]
    Argument { what: &'static str, reason: &'static str },
}

impl XenError {
    /// A failed call whose errno has been read. ESRCH is Xen's word for a domain that is not there.
    pub(crate) fn call(what: &'static str, domid: Option<DomId>, source: io::Error) -> Self {
        match domid {
            Some(domid) if source.raw_os_error() == Some(libc::ESRCH) => XenError::NoSuchDomain(domid),
            _ => XenError::Call { what, domid, source },
        }
    }

    /// The errno underneath, if a system call or hypercall set one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            XenError::Call { source, .. }
            | XenError::Unavailable { source, .. }
            | XenError::LogDirtyRefused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// " of d5", or nothing.
struct OfDomain<'a>(&'a Option<DomId>);

impl fmt::Display for OfDomain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(domid) => write!(f, " of {domid}"),
            None => Ok(()),
        }
    }
}

/// libxl's names (`libxl_types.idl`) for the codes that our calls answer with.
fn libxl_error_name(code: i32) -> &'static str {
    use crate::ffi::light;
    match code {
        light::ERROR_FAIL => "ERROR_FAIL",
        light::ERROR_NOMEM => "ERROR_NOMEM",
        light::ERROR_INVAL => "ERROR_INVAL",
        light::ERROR_BADFAIL => "ERROR_BADFAIL",
        light::ERROR_GUEST_TIMEDOUT => "ERROR_GUEST_TIMEDOUT",
        light::ERROR_TIMEDOUT => "ERROR_TIMEDOUT",
        light::ERROR_NOT_READY => "ERROR_NOT_READY",
        light::ERROR_LOCK_FAIL => "ERROR_LOCK_FAIL",
        light::ERROR_DOMAIN_NOTFOUND => "ERROR_DOMAIN_NOTFOUND",
        light::ERROR_ABORTED => "ERROR_ABORTED",
        light::ERROR_NOTFOUND => "ERROR_NOTFOUND",
        light::ERROR_DOMAIN_DESTROYED => "ERROR_DOMAIN_DESTROYED",
        _ => "libxl error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_domain_and_leave_the_cause_to_source() {
        let domid = DomId::new(7);
        let error = XenError::call("xc_domain_pause", domid, io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(error.to_string(), "xc_domain_pause of d7 failed");
        assert!(std::error::Error::source(&error).is_some());
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let gone = XenError::call("xc_domain_pause", domid, io::Error::from_raw_os_error(libc::ESRCH));
        assert!(matches!(gone, XenError::NoSuchDomain(d) if Some(d) == domid));
        assert_eq!(gone.to_string(), "there is no domain d7");
    }

    #[test]
    fn libxl_codes_have_names() {
        let error = XenError::Libxl {
            what: "libxl_domain_resume",
            domid: DomId::new(3),
            code: -3,
        };
        assert_eq!(error.to_string(), "libxl_domain_resume of d3 failed: ERROR_FAIL (-3)");
    }

    #[test]
    fn a_version_mismatch_says_both_versions() {
        let error = XenError::VersionMismatch {
            built: XenVersion { major: 4, minor: 17 },
            running: XenVersion { major: 4, minor: 20 },
        };
        assert!(
            error
                .to_string()
                .contains("built for Xen 4.17 and the hypervisor is Xen 4.20"),
            "{error}"
        );
    }
}

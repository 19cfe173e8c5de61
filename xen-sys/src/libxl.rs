//! The toolstack's own operations (libxenlight): what `xl` does to a guest and 4.17's command line cannot be asked for.
//!
//! libxl's records (names, devices, the device model) stay right only if changes go through it, so a guest that a
//! migration left behind is resumed, renamed or destroyed with these and not with [`crate::Xenctrl`].
use std::ffi::CStr;
use std::ptr::{self, NonNull};
use std::sync::Mutex;
use std::sync::PoisonError;

use crate::ffi::{self, Logger, c_string, errno, light, symbol};
use crate::store::Allocated;
use crate::{DomId, XenError};

/// How many contexts are open in this process: libxl's SIGCHLD handler is installed while there is any.
static CONTEXTS: Mutex<usize> = Mutex::new(0);

/// libxl starts helpers (device hotplug scripts) and must reap only those: in its default mode it would take the exit
/// status of our ssh as well. libxl keeps the address.
static CHILDREN: Hooks = Hooks(light::libxl_childproc_hooks {
    chldowner: light::libxl_sigchld_owner_libxl_always_selective_reap,
    fork_replacement: None,
    reaped_callback: None,
});

struct Hooks(light::libxl_childproc_hooks);
// SAFETY: never written to; the pointers in it are absent.
unsafe impl Sync for Hooks {}

/// A libxl context. `Send`, not `Sync`: libxl would lock for us, but nothing here is worth two threads.
///
/// While it is open libxl handles SIGCHLD for the process: no other handler may be installed, and children are to be
/// waited for by their number, as `std::process` does. libxl's warnings and errors go to stderr.
pub struct Libxl {
    library: &'static light::LightLib,
    context: NonNull<light::libxl_ctx>,
    /// Last, so that it outlives the context that logs through it.
    _logger: Logger,
}

// SAFETY: a context is heap data with locks of its own and may be used from any thread (libxl.h).
unsafe impl Send for Libxl {}

impl Libxl {
    /// # Errors
    /// [`XenError::LibraryMissing`], [`XenError::VersionMismatch`]; [`XenError::Libxl`] outside a dom0, without root or
    /// without xenstored; [`XenError::Argument`] when the process has a SIGCHLD handler, which libxl would abort about.
    pub fn open() -> Result<Self, XenError> {
        let library = ffi::light()?;
        let alloc = symbol!(library, libxl_ctx_alloc);
        let setmode = symbol!(library, libxl_childproc_setmode);
        symbol!(library, libxl_ctx_free);
        let logger = Logger::warnings()?;
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if *contexts == 0 && sigchld_is_taken() {
            return Err(XenError::Argument {
                what: "libxl",
                reason: "this process handles SIGCHLD itself",
            });
        }
        let mut context = ptr::null_mut();
        // SAFETY: `context` is where the new context goes; the logger outlives it.
        let code = unsafe { alloc(&mut context, light::LIBXL_VERSION as i32, 0, logger.as_ptr()) };
        let Some(context) = NonNull::new(context).filter(|_| code == 0) else {
            return Err(XenError::Libxl {
                what: "libxl_ctx_alloc",
                domid: None,
                code,
            });
        };
        // SAFETY: the context is new and has no children; the hooks are static, as they must be.
        unsafe { setmode(context.as_ptr(), &CHILDREN.0, ptr::null_mut()) };
        *contexts += 1;
        Ok(Libxl {
            library,
            context,
            _logger: logger,
        })
    }

    /// Sets a suspended domain going again where it stopped: the guest sees its suspend call return as cancelled. For
    /// the source of a migration that did not come to its end.
    ///
    /// Never for a guest whose copy may be running elsewhere.
    pub fn resume(&self, domid: DomId) -> Result<(), XenError> {
        let resume = symbol!(self.library, libxl_domain_resume);
        // SAFETY: the context is open; no asyncop_how means that the call returns when it is done.
        let code = unsafe { resume(self.context.as_ptr(), domid.get(), 1, ptr::null()) };
        check("libxl_domain_resume", domid, code)
    }

    /// Renames a domain that is called `old`; refused (ERROR_INVAL) when it is called otherwise, or when another domain is
    /// called `new`.
    pub fn rename(&self, domid: DomId, old: &str, new: &str) -> Result<(), XenError> {
        let rename = symbol!(self.library, libxl_domain_rename);
        let (old, new) = (
            c_string("libxl_domain_rename", old)?,
            c_string("libxl_domain_rename", new)?,
        );
        // SAFETY: the context is open and both names end in NUL.
        let code = unsafe { rename(self.context.as_ptr(), domid.get(), old.as_ptr(), new.as_ptr()) };
        check("libxl_domain_rename", domid, code)
    }

    /// Takes back a pause as `xl unpause` does (with the device model's, for HVM).
    pub fn unpause(&self, domid: DomId) -> Result<(), XenError> {
        let unpause = symbol!(self.library, libxl_domain_unpause);
        // SAFETY: the context is open; synchronous.
        let code = unsafe { unpause(self.context.as_ptr(), domid.get(), ptr::null()) };
        check("libxl_domain_unpause", domid, code)
    }

    /// Ends a domain and its devices, as `xl destroy`.
    pub fn destroy(&self, domid: DomId) -> Result<(), XenError> {
        let destroy = symbol!(self.library, libxl_domain_destroy);
        // SAFETY: the context is open; synchronous.
        let code = unsafe { destroy(self.context.as_ptr(), domid.get(), ptr::null()) };
        check("libxl_domain_destroy", domid, code)
    }

    /// A domain's name; `None` when there is no such domain or it has none yet.
    pub fn name(&self, domid: DomId) -> Result<Option<String>, XenError> {
        let domid_to_name = symbol!(self.library, libxl_domid_to_name);
        // SAFETY: the context is open.
        let name = unsafe { domid_to_name(self.context.as_ptr(), domid.get()) };
        let Some(name) = Allocated::new(name) else {
            let source = errno();
            return match source.raw_os_error() {
                Some(libc::ENOENT) => Ok(None),
                _ => Err(XenError::call("libxl_domid_to_name", Some(domid), source)),
            };
        };
        // SAFETY: the library returned a string that ends in NUL.
        Ok(Some(
            unsafe { CStr::from_ptr(name.0.as_ptr()) }
                .to_string_lossy()
                .into_owned(),
        ))
    }

    /// The domain of that name; `None` when there is none. (A name of digits is a name here.)
    pub fn domid_of(&self, name: &str) -> Result<Option<DomId>, XenError> {
        let name_to_domid = symbol!(self.library, libxl_name_to_domid);
        let name = c_string("libxl_name_to_domid", name)?;
        let mut domid = u32::MAX;
        // SAFETY: the context is open, the name ends in NUL, `domid` is where the number goes.
        let code = unsafe { name_to_domid(self.context.as_ptr(), name.as_ptr(), &mut domid) };
        match code {
            0 => Ok(DomId::new(domid)),
            // Its word for "not found" (`tools/libs/light/libxl_utils.c`).
            light::ERROR_INVAL | light::ERROR_NOTFOUND => Ok(None),
            code => Err(XenError::Libxl {
                what: "libxl_name_to_domid",
                domid: None,
                code,
            }),
        }
    }
}

impl Drop for Libxl {
    fn drop(&mut self) {
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(free) = &self.library.libxl_ctx_free {
            // SAFETY: allocated once, freed once; no operation is under way, as all are synchronous.
            unsafe { free(self.context.as_ptr()) };
        }
        *contexts = contexts.saturating_sub(1);
    }
}

/// Whether somebody has installed a SIGCHLD handler: libxl asserts that nobody has (`tools/libs/light/libxl_fork.c`).
fn sigchld_is_taken() -> bool {
    // SAFETY: plain data, for which zero is valid; sigaction fills it.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null new action the call only reads.
    let status = unsafe { libc::sigaction(libc::SIGCHLD, ptr::null(), &mut current) };
    status == 0 && current.sa_sigaction != libc::SIG_DFL && current.sa_sigaction != libc::SIG_IGN
}

fn check(what: &'static str, domid: DomId, code: i32) -> Result<(), XenError> {
    match code {
        0 => Ok(()),
        light::ERROR_DOMAIN_NOTFOUND => Err(XenError::NoSuchDomain(domid)),
        code => Err(XenError::Libxl {
            what,
            domid: Some(domid),
            code,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigchld_is_free_in_a_plain_process() {
        assert!(!sigchld_is_taken());
    }

    #[test]
    fn a_domain_that_is_gone_has_an_error_of_its_own() {
        let domid = DomId::new(3).unwrap();
        assert!(matches!(check("x", domid, -21), Err(XenError::NoSuchDomain(d)) if d == domid));
        assert!(check("x", domid, 0).is_ok());
    }
}

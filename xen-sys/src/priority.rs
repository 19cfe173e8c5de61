//! The calling thread before all others, for a moment.
use std::io;

/// As long as it lives the thread that made it runs before those of ordinary priority. For calls that pause a guest: Linux may
/// run other threads in the midst of a hypercall (xen_maybe_preempt_hcall), and the guest waits for those, too.
///
/// Not to be given to another thread.
#[derive(Debug)]
pub struct Urgent {
    /// What it was before, the policy and its parameters; `None`: it could not be changed.
    before: Option<(libc::c_int, libc::sched_param)>,
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Urgent {
    /// Where that is not allowed the thread goes on as it is.
    pub fn begin() -> Urgent {
        let before = make_urgent()
            .map_err(|error| log::trace!("no realtime priority: {error}"))
            .ok();
        Urgent {
            before,
            _not_send: std::marker::PhantomData,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some((policy, parameters)) = &self.before {
            // SAFETY: the parameters live until the call returns; 0 is the calling thread.
            unsafe { libc::sched_setscheduler(0, *policy, parameters) };
        }
    }
}

fn make_urgent() -> io::Result<(libc::c_int, libc::sched_param)> {
    let mut before = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    // SAFETY: the parameters are written here and live until the call returns.
    if policy < 0 || unsafe { libc::sched_getparam(0, &mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: there is no argument to be wrong about.
    let lowest = unsafe { libc::sched_get_priority_min(libc::SCHED_FIFO) };
    let urgent = libc::sched_param { sched_priority: lowest };
    // A child would be of ordinary priority.
    // SAFETY: the parameters live until the call returns; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &urgent) } {
        0 => Ok((policy, before)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_urgent_for_a_moment_only() {
        // SAFETY: 0 is the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) } & !libc::SCHED_RESET_ON_FORK;
        let ordinary = policy();
        let urgent = Urgent::begin();
        assert!(policy() == libc::SCHED_FIFO || urgent.before.is_none());
        drop(urgent);
        assert_eq!(policy(), ordinary);
    }
}

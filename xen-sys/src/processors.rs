//! What the physical processors have done, as Xen counts it.
use std::time::Duration;

use crate::ffi::{ctrl, errno, symbol};
use crate::{XenError, Xenctrl};

/// More processors than any release allows (`CONFIG_NR_CPUS`, `xen/arch/Kconfig`); bounds what is allocated.
const MOST: i32 = 1 << 16;

impl Xenctrl {
    /// How long each physical processor has been idle since Xen started, by its number (XEN_SYSCTL_getcpuinfo). One that
    /// is offline, or has never been idle, reads as zero.
    pub fn idle_times(&self) -> Result<Vec<Duration>, XenError> {
        self.check_version()?;
        let get_max_cpus = symbol!(self.handle.library, xc_get_max_cpus);
        let getcpuinfo = symbol!(self.handle.library, xc_getcpuinfo);
        // SAFETY: the handle is open.
        let most = unsafe { get_max_cpus(self.handle.as_ptr()) };
        if most <= 0 {
            return Err(XenError::call("xc_get_max_cpus", None, errno()));
        }
        let most = most.min(MOST);
        let mut infos = vec![ctrl::xc_cpuinfo_t { idletime: 0 }; usize::try_from(most).unwrap_or_default()];
        let mut told = 0;
        // SAFETY: the handle is open; the buffer has room for `most` structures of the ABI that check_version has just
        // confirmed, and `told` is where their number goes.
        let status = unsafe { getcpuinfo(self.handle.as_ptr(), most, infos.as_mut_ptr(), &mut told) };
        if status != 0 {
            return Err(XenError::call("xc_getcpuinfo", None, errno()));
        }
        Ok(idle(&infos, told))
    }
}

fn idle(infos: &[ctrl::xc_cpuinfo_t], told: i32) -> Vec<Duration> {
    let told = usize::try_from(told).unwrap_or_default();
    let infos = infos.iter().take(told);
    infos.map(|info| Duration::from_nanos(info.idletime)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_believed_as_were_told_of_and_fit() {
        assert_eq!(size_of::<ctrl::xc_cpuinfo_t>(), 8);
        let infos = [3, 0, 5].map(|idletime| ctrl::xc_cpuinfo_t { idletime });
        let nanos = |told| -> Vec<u128> { idle(&infos, told).iter().map(Duration::as_nanos).collect() };
        assert_eq!(nanos(2), [3, 0]);
        assert_eq!(nanos(4), [3, 0, 5]);
        assert!(nanos(-1).is_empty());
    }
}

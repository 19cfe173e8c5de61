//! Xen's migration stream.

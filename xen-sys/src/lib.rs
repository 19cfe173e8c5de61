//! Safe handles over Xen's libraries.

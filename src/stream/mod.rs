//! Reader and writer of the whole stream that `xl migrate` sends and `xl save` writes, nothing lost.
//!
//! [`Reader::new`] starts at xl's header, [`Reader::at_libxl`] behind it; [`Reader::next`] gives [`Event`]s, bodies are
//! read in between. [`Writer`] takes the same events and bodies. [`PageData`] looks into a PAGE_DATA body,
//! [`PageDataHead`] into its pfn list before the pages have been read.
//!
//! The order of the stream:
//!
//! ```text
//! XlHeader                                 xl: S0 and S1
//! LibxlHeader                              libxl: "LibxlFmt"
//!   Record libxl LIBXC_CONTEXT
//!     ImageHeader, DomainHeader            libxc
//!       Record libxc …
//!       Record libxc CHECKPOINT            Remus and COLO only
//!         Record libxl …, CHECKPOINT_END   and for COLO then CHECKPOINT_STATE
//!       Record libxc END
//!   Record libxl EMULATOR_…                HVM only
//!   Record libxl END
//! End
//! ```
//!
//! What is checked is what Xen's own readers refuse and what is needed to find the next record. Whether the records
//! make a guest is for Xen to judge: their order inside a layer, and bodies other than PAGE_DATA's, are not looked at.
mod error;
mod page_data;
mod pages;
mod reader;
mod record;
#[cfg(test)]
mod tests;
mod writer;
pub mod xl;

pub use error::{Part, StreamError};
pub use page_data::{Entry, PAGE_DATA_FIXED_SIZE, PageData, PageDataHead, PageType};
pub use pages::for_each_page;
pub use reader::{Event, Reader};
pub use record::{
    DOMAIN_HEADER_SIZE, DomainHeader, GuestType, IMAGE_HEADER_SIZE, IMAGE_MAGIC, ImageHeader, LIBXC_BODY_MAX,
    LIBXL_HEADER_SIZE, LIBXL_IDENT, Layer, LibxlHeader, RECORD_HEADER_SIZE, RecordHeader, kind_name, libxc, libxl,
};
pub use writer::Writer;
pub use xl::XlHeader;

//! Pages to rows and back: [`rows`] writes what each page of a record is, [`block`] compresses those sent in full,
//! [`delta`] those that differ little from what the other end has.
pub mod block;
pub mod delta;
pub mod rows;
pub(crate) mod varint;

pub use block::{Compressor, Decompressor, Level};
pub use rows::{Base, MAX_ROWS, Row};

/// What is wrong with encoded rows or blocks. Nothing of them is used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("the rows end too early")]
    Short,
    #[error("{0} bytes follow the last row")]
    Trailing(usize),
    #[error("a number is longer than 64 bits")]
    Varint,
    #[error("a run of rows is empty or passes the record's {count} entries")]
    Run { count: usize },
    #[error("row kind {0} is unknown")]
    Kind(u64),
    #[error("a page number or reference lies outside 52 bits")]
    Pfn,
    #[error("a block of {pages} pages does not decompress: {why}")]
    Block { pages: usize, why: String },
    #[error("block codec {0} is unknown")]
    BlockCodec(u8),
}

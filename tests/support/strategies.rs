//! Random [`StreamSpec`]s.
use super::{Batch, Guest, Mix, Start, StreamSpec};
use proptest::prelude::*;

fn mix() -> impl Strategy<Value = Mix> {
    let weights = (0u32..4, 0u32..4, 0u32..4, 0u32..4, 0u32..4, 0u32..4, 0u32..4);
    weights.prop_map(|(zero, repeat, neighbour, random, text, similar, constant)| Mix {
        zero,
        repeat,
        neighbour,
        random,
        text,
        similar,
        constant,
    })
}

fn guest() -> impl Strategy<Value = Guest> {
    prop_oneof![Just(Guest::Pv), Just(Guest::Hvm), Just(Guest::Pvh)]
}

fn batch() -> impl Strategy<Value = Batch> {
    prop_oneof![
        Just(Batch::Fixed(1)),
        (2usize..8).prop_map(Batch::Fixed),
        (2usize..8).prop_map(Batch::Mixed),
        Just(Batch::Aligned)
    ]
}

/// Streams of up to 12 pages and 4 passes with everything that a stream can have, so that thousands of them are tried
/// in a minute.
pub fn small_spec() -> impl Strategy<Value = StreamSpec> {
    let shape = (any::<u64>(), guest(), 2u32..=3, any::<bool>(), 0usize..=12, 1usize..=4);
    let pages = (mix(), batch(), 0u32..60, 0u32..100, 0u32..40, 0u32..60);
    let extras = (any::<[bool; 7]>(), 0usize..3, 0usize..40);
    (shape, pages, extras).prop_map(|(shape, pages, (flags, checkpoints, emulator_context))| StreamSpec {
        seed: shape.0,
        guest: shape.1,
        version: shape.2,
        start: if shape.3 { Start::Xl } else { Start::Libxl },
        pages: shape.4,
        passes: shape.5,
        mix: pages.0,
        batch: pages.1,
        hole_percent: pages.2,
        dirty_percent: pages.3,
        rewrite_similar: shape.0 % 3 == 0,
        no_data_percent: pages.4,
        page_table_percent: pages.5,
        repeat_in_record: flags[0],
        verify: flags[1],
        optional_records: flags[2],
        unknown_records: flags[3],
        emulator_xenstore: flags[4],
        odd_lengths: flags[5],
        dirty_reserved: flags[6],
        // VERIFY ends what a restore applies; Xen has no stream with both.
        checkpoints: if flags[1] { 0 } else { checkpoints },
        emulator_context,
        vcpus: 1 + (shape.0 % 2) as u32,
    })
}

/// The same, without what `verify-stream-v2` cannot read.
pub fn oracle_spec() -> impl Strategy<Value = StreamSpec> {
    small_spec().prop_map(StreamSpec::for_oracle)
}

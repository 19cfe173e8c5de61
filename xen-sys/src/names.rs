//! How xl and libxl write what names a guest.

/// What xl appends to the name of a guest under construction at the destination of a migration (tools/xl/xl_migrate.c).
pub const INCOMING: &str = "--incoming";

/// What xl appends to the name of a guest at the source once it has been handed over (tools/xl/xl_migrate.c).
pub const AWAY: &str = "--migratedaway";

/// The uuid as xl prints it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |range| hex.get(range).unwrap_or_default();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_read_as_xl_prints_them() {
        let uuid = std::array::from_fn(|i| i as u8 * 0x11);
        assert_eq!(uuid_text(&uuid), "00112233-4455-6677-8899-aabbccddeeff");
    }
}

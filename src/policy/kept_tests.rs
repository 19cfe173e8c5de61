use super::*;
use crate::page_set::PageSet;
use crate::policy::model::Builder;

const INTERVAL: Duration = Duration::from_millis(50);
const BOUND: u64 = 1024;

fn written(runs: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::new(BOUND);
    runs.iter().for_each(|(start, end)| set.insert_run(*start..*end));
    set
}

/// Of a guest that writes pages 0 to 3 and 100 to 103 by turns, and page 8 always.
fn kept() -> Kept {
    let mut builder = Builder::new(BOUND, BOUND, INTERVAL);
    for turn in 0..40 {
        let region = if turn % 2 == 0 { (0, 4) } else { (100, 104) };
        assert!(builder.sample(&written(&[region, (8, 9)])));
    }
    crate::policy::filter::Filter::new(Some(builder.finish()), BOUND, BOUND).learnt()
}

#[test]
fn models_come_back_from_where_they_are_kept() {
    let kept = kept();
    assert_eq!((kept.pages(), kept.states.len()), (9, 2));
    assert!(kept.ages.contains(0) && kept.ages.contains(8) && !kept.ages.contains(9));
    let bytes = kept.to_bytes().unwrap();
    Kept::check(&bytes).unwrap();
    assert_eq!(Kept::from_bytes(&bytes, BOUND), Ok(kept));
    let (found, expected) = (BOUND, 5);
    assert_eq!(
        Kept::from_bytes(&bytes, 5),
        Err(KeptError::OtherGuest { found, expected })
    );
}

#[test]
fn a_header_has_these_bytes() {
    let bytes = kept().to_bytes().unwrap();
    let words = [
        &b"XFMODEL\n"[..],
        &[1, 0, 0, 0, 50, 0, 0, 0],
        &[0, 4, 0, 0, 0, 0, 0, 0],
        &[4, 0, 0, 0, 0, 0, 0, 0],
        &[0, 1, 26, 0],
    ];
    assert_eq!(bytes[..36], words.concat());
    assert_eq!(bytes[40..44], checksum(&bytes).to_le_bytes());
    assert_eq!(bytes[44..48], kept().ages.unit_ms().to_le_bytes());
}

#[test]
fn damage_is_an_error() {
    let good = kept().to_bytes().unwrap();
    for end in 0..good.len() {
        assert!(Kept::check(&good[..end]).is_err(), "cut at {end}");
    }
    for bit in 0..good.len() * 8 {
        let mut damaged = good.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Kept::check(&damaged).is_err(), "bit {bit}");
    }
    assert!(matches!(
        Kept::check(&vec![0; MOST_BYTES + 1]),
        Err(KeptError::Length { .. })
    ));
}

/// A header and body whose checksum is right.
fn made(header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = header[..HEADER].to_vec();
    bytes[36..40].copy_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend(zstd::bulk::compress(body, 1).unwrap());
    let crc = checksum(&bytes).to_le_bytes();
    bytes[40..44].copy_from_slice(&crc);
    bytes
}

#[test]
fn a_peer_that_lies_is_refused() {
    let good = kept().to_bytes().unwrap();
    let body = zstd::bulk::decompress(&good[HEADER..], 1 << 20).unwrap();
    let read = |bytes: &[u8]| Kept::from_bytes(bytes, BOUND);
    assert_eq!(read(&made(&good, &body)), Ok(kept()));
    for (at, byte) in [(8, 2), (12, 0), (24, 0), (32, 0), (33, 5), (34, 25), (47, 1), (18, 1)] {
        let mut header = good[..HEADER].to_vec();
        header[at] = byte;
        if at == 12 || at == 24 {
            header[at..at + 4].fill(0);
        } else if at == 32 {
            header[32..34].fill(0);
        }
        assert!(read(&made(&header, &body)).is_err(), "header byte {at}");
    }
    for length in 0..body.len() {
        assert!(read(&made(&good, &body[..length])).is_err(), "cut at {length}");
    }
    assert!(read(&made(&good, &[&body[..], &[0]].concat())).is_err());
    let with = |at: usize, bytes: &[u8]| {
        let mut body = body.clone();
        body[at..at + bytes.len()].copy_from_slice(bytes);
        read(&made(&good, &body))
    };
    let states = BOUND as usize + 256 * 2 * BINS * 4;
    for number in [f32::NAN, f32::INFINITY, -1.0, 1e13] {
        assert!(with(BOUND as usize, &number.to_le_bytes()).is_err());
    }
    // The number of states, of a region, of followers, a follower, the working set's length and kind.
    for (at, value) in [(0, 3u16), (0, 999), (2, 257), (6, 3), (12, 2), (8, 999), (16, 7)] {
        assert!(with(states + at, &value.to_le_bytes()).is_err(), "{at}");
    }
}

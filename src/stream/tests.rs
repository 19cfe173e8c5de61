//! Headers, records and refusals, byte for byte as literals. Whole streams are in tests/stream.rs.
use super::*;
use crate::page::{PAGE_SIZE, Pfn};

const S0: &[u8; 48] = b"Xen saved domain, xl format\n \0 \r\
    \x04\x03\x02\x01\x03\0\0\0\0\0\0\0\x34\0\0\0";
const S1: &[u8; 52] = b"\x30\0\0\0{\"c_info\":{\"name\":\"web\"},\"b_info\":{\"x\":[]}}    \0";
const LIBXL: &[u8; 16] = b"LibxlFmt\0\0\0\x02\0\0\0\0";
const CONTEXT: &[u8; 8] = b"\x01\0\0\0\0\0\0\0";
const IMAGE_V3: &[u8; 24] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03\0\0\0\0\0\0\0\0";
const IMAGE_V2: &[u8; 24] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x02\0\0\0\0\0\0\0\0";
const HVM: &[u8; 16] = b"\x02\0\0\0\x0c\0\0\0\x04\0\0\0\x11\0\0\0";
const PV: &[u8; 16] = b"\x01\0\0\0\x0c\0\0\0\x04\0\0\0\x0e\0\0\0";
const END: &[u8; 8] = b"\0\0\0\0\0\0\0\0";

/// Every event of a good stream, bodies (with padding) beside their records.
fn read_all(reader: &mut Reader<&[u8]>) -> Vec<(Event, Vec<u8>)> {
    let mut events = Vec::new();
    loop {
        let event = reader.next().unwrap();
        let mut body = Vec::new();
        reader.read_body(&mut body, 1 << 20).unwrap();
        let end = event == Event::End;
        events.push((event, body));
        if end {
            return events;
        }
    }
}

/// The error that ends reading this.
fn refusal(mut reader: Reader<&[u8]>) -> StreamError {
    loop {
        if let Err(error) = reader.next() {
            return error;
        }
        reader.read_body(&mut Vec::new(), 1 << 20).unwrap();
    }
}

fn libxc_stream(image: &[u8; 24], domain: &[u8; 16], records: &[u8]) -> Vec<u8> {
    [&LIBXL[..], CONTEXT, image, domain, records, END, END].concat()
}

#[test]
fn xl_messages() {
    assert_eq!(xl::R0_BANNER.len(), 54);
    assert_eq!(xl::S0_MAGIC.len(), 32);
    assert_eq!((xl::R1_READY.len(), xl::R1_READY.last()), (34, Some(&0)));
    assert_eq!((xl::GO.len(), xl::GO.last()), (44, Some(&0)));
    assert_eq!((xl::R2_REPORT.len(), xl::R2_REPORT.last()), (39, Some(&0)));
    assert_eq!(xl::R3_GO_BACK, xl::GO);
}

#[test]
fn whole_stream_event_by_event() {
    let stream = [
        S0,
        &S1[..],
        LIBXL,
        CONTEXT,
        IMAGE_V3,
        HVM,
        b"\x10\0\0\0\0\0\0\0",
        END,
        END,
    ]
    .concat();
    let mut reader = Reader::new(&stream[..]);
    let events = read_all(&mut reader);
    let parts: Vec<Part> = events.iter().map(|(event, _)| event.part()).collect();
    assert_eq!(
        parts,
        [
            Part::XlHeader,
            Part::LibxlHeader,
            Part::Record(Layer::Libxl, libxl::LIBXC_CONTEXT),
            Part::ImageHeader,
            Part::DomainHeader,
            Part::Record(Layer::Libxc, libxc::STATIC_DATA_END),
            Part::Record(Layer::Libxc, libxc::END),
            Part::Record(Layer::Libxl, libxl::END),
            Part::End,
        ]
    );
    let bytes: Vec<u8> = events
        .iter()
        .flat_map(|(event, _)| event.bytes().into_owned())
        .collect();
    assert_eq!(bytes, stream);
    assert_eq!(reader.offset(), stream.len() as u64);
}

#[test]
fn xl_header() {
    let stream = [&S0[..], S1].concat();
    let Event::XlHeader(header) = Reader::new(&stream[..]).next().unwrap() else {
        panic!()
    };
    assert_eq!(header.as_bytes(), stream);
    assert_eq!((header.mandatory_flags(), header.optional_flags()), (3, 0));
    assert_eq!(header.json(), &S1[4..51]);
    assert_eq!(
        (header.name(), header.uuid(), header.memory_kib()),
        (Some("web"), None, None)
    );
}

#[test]
fn xl_header_without_configuration_or_with_more_than_it() {
    let mut none = S0.to_vec();
    none[44] = 0;
    let Event::XlHeader(header) = Reader::new(&none[..]).next().unwrap() else {
        panic!()
    };
    assert_eq!(
        (header.json(), header.name(), header.as_bytes()),
        (&b""[..], None, &none[..])
    );

    let mut more = [&S0[..], S1, b"tail"].concat();
    more[44] += 4;
    let Event::XlHeader(header) = Reader::new(&more[..]).next().unwrap() else {
        panic!()
    };
    assert_eq!((header.json(), header.as_bytes()), (&S1[4..51], &more[..]));
}

#[test]
fn xl_configuration_is_read_leniently() {
    let name_of = |json: &str| {
        let mut raw = S0.to_vec();
        raw[44..].copy_from_slice(&(json.len() as u32 + 4).to_le_bytes());
        raw.extend_from_slice(&(json.len() as u32).to_le_bytes());
        raw.extend_from_slice(json.as_bytes());
        let Event::XlHeader(header) = Reader::new(&raw[..]).next().unwrap() else {
            panic!()
        };
        (
            header.name().map(str::to_owned),
            header.uuid().map(str::to_owned),
            header.memory_kib(),
        )
    };
    let web = Some("web".to_owned());
    assert_eq!(name_of("name = \"web\"\n"), (None, None, None));
    assert_eq!(name_of("{}"), (None, None, None));
    assert_eq!(name_of("[]"), (None, None, None));
    assert_eq!(name_of(&"[".repeat(100_000)), (None, None, None));
    assert_eq!(
        name_of("{\"c_info\":{\"name\":\"web\",\"uuid\":5},\"b_info\":{}}"),
        (web.clone(), None, None)
    );
    assert_eq!(
        name_of("{\"c_info\":{\"name\":\"web\",\"uuid\":\"u\"},\"b_info\":{\"target_memkb\":7}}\0"),
        (web.clone(), Some("u".to_owned()), Some(7))
    );
    let both = "{\"c_info\":{\"name\":\"web\"},\"b_info\":{\"target_memkb\":7,\"max_memkb\":8}}";
    assert_eq!(name_of(both), (web, None, Some(8)));
}

#[test]
fn xl_header_refusals() {
    let with = |at: usize, bytes: &[u8]| {
        let mut stream = [&S0[..], S1].concat();
        stream[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(Reader::new(&stream[..])).to_string()
    };
    assert_eq!(
        with(0, b"LibxlFmt"),
        "stream offset 0, xl's header: expected \"Xen saved domain, xl format\\n \\x00 \\r\", \
         found \"LibxlFmtd domain, xl format\\n \\x00 \\r\""
    );
    assert_eq!(
        with(32, b"\x01\x02\x03\x04"),
        "stream offset 32, xl's header: expected byteorder 0x1020304, found 0x4030201"
    );
    assert_eq!(
        with(36, b"\x07\0\0\x80"),
        "stream offset 36, xl's header: expected mandatory flags among 0x3, found also 0x80000004"
    );
    assert_eq!(
        with(36, b"\x01"),
        "stream offset 36, xl's header: expected mandatory_flags with bit 1 set (stream v2, Xen 4.6 or later), found 0x1"
    );
    assert_eq!(
        with(44, b"\xff\xff\xff\xff"),
        "stream offset 44, xl's header: expected at most 16777220 bytes, found a length of 4294967295"
    );
    for (at, value) in [(48, b"\x31\0\0\0"), (48, b"\xff\xff\xff\xff"), (44, b"\x02\0\0\0")] {
        let said = with(at, value);
        assert!(
            said.starts_with(
                "stream offset 48, xl's configuration data: expected configuration length to fit into optional_data_len"
            ),
            "{said}"
        );
    }
}

#[test]
fn libxl_header() {
    let Event::LibxlHeader(header) = Reader::at_libxl(&LIBXL[..]).next().unwrap() else {
        panic!()
    };
    assert_eq!(
        (header.version(), header.options(), header.as_bytes()),
        (2, 0, &LIBXL[..])
    );
    // Made by Xen's converter from the legacy format: accepted, as libxl does.
    let legacy = b"LibxlFmt\0\0\0\x02\0\0\0\x02";
    let Event::LibxlHeader(header) = Reader::at_libxl(&legacy[..]).next().unwrap() else {
        panic!()
    };
    assert_eq!(header.options(), 2);

    let said = |raw: &[u8]| refusal(Reader::at_libxl(raw)).to_string();
    assert_eq!(
        said(b"LibxlFmx\0\0\0\x02\0\0\0\0"),
        "stream offset 0, libxl's header: expected \"LibxlFmt\", found \"LibxlFmx\""
    );
    assert_eq!(
        said(b"LibxlFmt\0\0\0\x03\0\0\0\0"),
        "stream offset 8, libxl's header: expected version 2, found 0x3"
    );
    assert_eq!(
        said(b"LibxlFmt\0\0\0\x02\0\0\0\x01"),
        "stream offset 12, libxl's header: expected options with bit 0 clear (little-endian), found 0x1"
    );
}

#[test]
fn image_header() {
    for (image, version) in [(IMAGE_V2, 2), (IMAGE_V3, 3)] {
        let stream = libxc_stream(image, HVM, b"");
        let events = read_all(&mut Reader::at_libxl(&stream[..]));
        let Event::ImageHeader(header) = &events[2].0 else {
            panic!()
        };
        assert_eq!(
            (header.version(), header.options(), header.as_bytes()),
            (version, 0, &image[..])
        );
    }
    let with = |at: usize, byte: u8| {
        let mut image = *IMAGE_V3;
        image[at] = byte;
        refusal(Reader::at_libxl(&libxc_stream(&image, HVM, b"")[..])).to_string()
    };
    assert!(with(0, 0).starts_with(
        "stream offset 24, libxc's image header: expected eight bytes of 0xff and \"XENF\", found \"\\x00\\xff"
    ));
    assert!(with(11, b'G').ends_with("XENG\""));
    assert_eq!(
        with(15, 4),
        "stream offset 36, libxc's image header: expected version 2 or 3, found 0x4"
    );
    assert_eq!(
        with(15, 1),
        "stream offset 36, libxc's image header: expected version 2 or 3, found 0x1"
    );
    assert_eq!(
        with(17, 1),
        "stream offset 40, libxc's image header: expected options with bit 0 clear (little-endian), found 0x1"
    );
}

#[test]
fn domain_header() {
    for (domain, guest_type, minor) in [(HVM, GuestType::Hvm, 17), (PV, GuestType::Pv, 14)] {
        let stream = libxc_stream(IMAGE_V3, domain, b"");
        let events = read_all(&mut Reader::at_libxl(&stream[..]));
        let Event::DomainHeader(header) = &events[3].0 else {
            panic!()
        };
        assert_eq!((header.guest_type(), header.xen_version()), (guest_type, (4, minor)));
        assert_eq!(header.as_bytes(), domain);
    }
    let with = |at: usize, byte: u8| {
        let mut domain = *HVM;
        domain[at] = byte;
        refusal(Reader::at_libxl(&libxc_stream(IMAGE_V3, &domain, b"")[..])).to_string()
    };
    assert_eq!(
        with(0, 3),
        "stream offset 48, libxc's domain header: expected type 1 (PV) or 2 (HVM, PVH), found 0x3"
    );
    assert_eq!(
        with(4, 16),
        "stream offset 52, libxc's domain header: expected page_shift 12, found 0x10"
    );
}

/// Every record of libxc's, as literal bytes: kind, name, header and padded body.
#[test]
fn libxc_records() {
    let vectors: [(u32, &str, &[u8]); 20] = [
        (
            0x01,
            "PAGE_DATA",
            b"\x01\0\0\0\x10\0\0\0\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\xf0",
        ),
        (0x02, "X86_PV_INFO", b"\x02\0\0\0\x08\0\0\0\x08\x04\0\0\0\0\0\0"),
        (
            0x03,
            "X86_PV_P2M_FRAMES",
            b"\x03\0\0\0\x10\0\0\0\0\0\0\0\xff\x01\0\0\x09\0\0\0\0\0\0\0",
        ),
        (
            0x04,
            "X86_PV_VCPU_BASIC",
            b"\x04\0\0\0\x09\0\0\0\x01\0\0\0\0\0\0\0A\0\0\0\0\0\0\0",
        ),
        (
            0x05,
            "X86_PV_VCPU_EXTENDED",
            b"\x05\0\0\0\x0a\0\0\0\x01\0\0\0\0\0\0\0AB\0\0\0\0\0\0",
        ),
        (
            0x06,
            "X86_PV_VCPU_XSAVE",
            b"\x06\0\0\0\x0b\0\0\0\x01\0\0\0\0\0\0\0ABC\0\0\0\0\0",
        ),
        (0x07, "SHARED_INFO", b"\x07\0\0\0\x0c\0\0\0abcdefghijkl\0\0\0\0"),
        (
            0x08,
            "X86_TSC_INFO",
            b"\x08\0\0\0\x18\0\0\0\x01\0\0\0\x40\x77\x1b\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0",
        ),
        (0x09, "HVM_CONTEXT", b"\x09\0\0\0\x0d\0\0\0abcdefghijklm\0\0\0"),
        (
            0x0a,
            "HVM_PARAMS",
            b"\x0a\0\0\0\x18\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x07\xf0\x0f\0\0\0\0\0",
        ),
        (0x0b, "TOOLSTACK", b"\x0b\0\0\0\x0e\0\0\0abcdefghijklmn\0\0"),
        (
            0x0c,
            "X86_PV_VCPU_MSRS",
            b"\x0c\0\0\0\x0f\0\0\0\x01\0\0\0\0\0\0\0ABCDEFG\0",
        ),
        (0x0d, "VERIFY", b"\x0d\0\0\0\0\0\0\0"),
        (
            0x0f,
            "CHECKPOINT_DIRTY_PFN_LIST",
            b"\x0f\0\0\0\x08\0\0\0\x21\0\0\0\0\0\0\0",
        ),
        (0x10, "STATIC_DATA_END", b"\x10\0\0\0\0\0\0\0"),
        (
            0x11,
            "X86_CPUID_POLICY",
            b"\x11\0\0\0\x18\0\0\0\0\0\0\0\xff\xff\xff\xff\x0d\0\0\0AuthenticAMD",
        ),
        (
            0x12,
            "X86_MSR_POLICY",
            b"\x12\0\0\0\x10\0\0\0\xce\0\0\0\0\0\0\0\0\0\0\x80\0\0\0\0",
        ),
        (0x8000_0000, "", b"\0\0\0\x80\x01\0\0\0z\0\0\0\0\0\0\0"),
        (0xffff_ffff, "", b"\xff\xff\xff\xff\0\0\0\0"),
        // Padding that is not zero is kept, as every byte is.
        (0x09, "HVM_CONTEXT", b"\x09\0\0\0\x01\0\0\0aPADDING"),
    ];
    for (domain, image) in [(HVM, IMAGE_V3), (PV, IMAGE_V2)] {
        let records: Vec<u8> = vectors.iter().flat_map(|(_, _, raw)| raw.to_vec()).collect();
        let stream = libxc_stream(image, domain, &records);
        let events = read_all(&mut Reader::at_libxl(&stream[..]));
        assert_eq!(events.len(), 4 + vectors.len() + 3);
        let mut offset = 64;
        for ((kind, name, raw), (event, body)) in vectors.iter().zip(&events[4..]) {
            let Event::Record(header) = event else {
                panic!("{event:?}")
            };
            assert!(header.is(Layer::Libxc, *kind), "{header:?}");
            assert_eq!(kind_name(header.layer, header.kind).unwrap_or_default(), *name);
            assert_eq!((header.offset, header.body_offset()), (offset, offset + 8));
            assert_eq!((header.bytes().as_slice(), body.as_slice()), (&raw[..8], &raw[8..]));
            assert_eq!(header.padded_length(), body.len() as u64);
            offset += raw.len() as u64;
        }
    }
}

#[test]
fn libxl_records() {
    let xenstore = b"\x02\0\0\0\x0d\0\0\0\x02\0\0\0\0\0\0\0a\0b\0\0\0\0\0";
    let emulator = b"\x03\0\0\0\x0b\0\0\0\x02\0\0\0\0\0\0\0QVM\0\0\0\0\0";
    let checkpoint_end = b"\x04\0\0\0\0\0\0\0";
    let state = b"\x05\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0";
    let stream = [&LIBXL[..], xenstore, emulator, checkpoint_end, state, END].concat();
    let events = read_all(&mut Reader::at_libxl(&stream[..]));
    let names: Vec<String> = events[1..].iter().map(|(event, _)| event.part().to_string()).collect();
    assert_eq!(
        names,
        [
            "libxl record EMULATOR_XENSTORE_DATA",
            "libxl record EMULATOR_CONTEXT",
            "libxl record CHECKPOINT_END",
            "libxl record CHECKPOINT_STATE",
            "libxl record END",
            "the end of the stream",
        ]
    );
    let Event::Record(header) = &events[1].0 else { panic!() };
    assert_eq!((header.length, header.padded_length(), events[1].1.len()), (13, 16, 16));
}

/// Remus, then COLO: libxl's records inside the libxc stream, and libxc's again after them.
#[test]
fn checkpoints_change_the_layer() {
    let checkpoint = b"\x0e\0\0\0\0\0\0\0";
    let checkpoint_end = b"\x04\0\0\0\0\0\0\0";
    let state = b"\x05\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0";
    let emulator = b"\x03\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\0";
    let vcpu = b"\x04\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0";
    let names = |domain, records: &[u8]| -> Vec<String> {
        let stream = libxc_stream(IMAGE_V3, domain, records);
        let events = read_all(&mut Reader::at_libxl(&stream[..]));
        events[4..].iter().map(|(event, _)| event.part().to_string()).collect()
    };
    assert_eq!(
        names(
            HVM,
            &[
                checkpoint,
                &emulator[..],
                checkpoint_end,
                checkpoint,
                checkpoint_end,
                state
            ]
            .concat()
        ),
        [
            "libxc record CHECKPOINT",
            "libxl record EMULATOR_CONTEXT",
            "libxl record CHECKPOINT_END",
            "libxc record CHECKPOINT",
            "libxl record CHECKPOINT_END",
            "libxl record CHECKPOINT_STATE",
            "libxc record END",
            "libxl record END",
            "the end of the stream",
        ]
    );
    // A PV guest's record 5 after a checkpoint is libxc's, and so is 4 outside of one.
    assert_eq!(
        names(
            PV,
            &[&vcpu[..], checkpoint, checkpoint_end, b"\x05\0\0\0\0\0\0\0"].concat()
        )[..4],
        [
            "libxc record X86_PV_VCPU_BASIC",
            "libxc record CHECKPOINT",
            "libxl record CHECKPOINT_END",
            "libxc record X86_PV_VCPU_EXTENDED",
        ]
    );
}

#[test]
fn unknown_records() {
    let libxc_unknown = libxc_stream(IMAGE_V3, HVM, b"\x13\0\0\0\x08\0\0\0abcdefgh");
    assert_eq!(
        refusal(Reader::at_libxl(&libxc_unknown[..])).to_string(),
        "stream offset 64, libxc record of unknown type 0x13: \
         expected a type of the specification, or one with bit 31 set"
    );
    // libxl knows no optional records.
    let libxl_unknown = [&LIBXL[..], &b"\x06\0\0\x80\x08\0\0\0abcdefgh"[..], END].concat();
    assert_eq!(
        refusal(Reader::at_libxl(&libxl_unknown[..])).to_string(),
        "stream offset 16, libxl record of unknown type 0x80000006: expected a type of the specification"
    );
    for stream in [libxc_unknown, libxl_unknown] {
        let events = read_all(&mut Reader::at_libxl(&stream[..]).pass_unknown(true));
        assert!(events.iter().any(|(_, body)| body == b"abcdefgh"));
    }
}

#[test]
fn unread_bodies() {
    let stream = libxc_stream(IMAGE_V3, HVM, b"\x09\0\0\0\x0d\0\0\0abcdefghijklm\0\0\0");
    let mut reader = Reader::at_libxl(&stream[..]);
    for _ in 0..5 {
        reader.next().unwrap();
    }
    assert_eq!((reader.offset(), reader.body_left()), (72, 16));
    assert_eq!(
        reader.next().unwrap_err().to_string(),
        "stream offset 72, libxc record HVM_CONTEXT: expected its body to be complete, 16 bytes of it are left"
    );
    let mut part = [0; 10];
    assert_eq!(reader.read_body_part(&mut part).unwrap(), 10);
    assert_eq!((&part, reader.offset(), reader.body_left()), (b"abcdefghij", 82, 6));
    let mut rest = b"=".to_vec();
    assert_eq!(
        reader.read_body(&mut rest, 5).unwrap_err().to_string(),
        "stream offset 82, libxc record HVM_CONTEXT: expected at most 5 bytes, found a length of 6"
    );
    reader.read_body(&mut rest, 6).unwrap();
    assert_eq!((&rest[..], reader.body_left()), (&b"=klm\0\0\0"[..], 0));
    assert_eq!(reader.read_body_part(&mut part).unwrap(), 0);
    assert_eq!(reader.next().unwrap().part(), Part::Record(Layer::Libxc, libxc::END));
}

#[test]
fn ends_too_early() {
    let stream = libxc_stream(IMAGE_V3, HVM, b"\x09\0\0\0\x0d\0\0\0abcdefghijklm\0\0\0");
    let said = |len: usize| {
        let mut reader = Reader::at_libxl(&stream[..len]);
        loop {
            if let Err(error) = reader.next().and_then(|_| reader.read_body(&mut Vec::new(), 1 << 20)) {
                // Whoever asks again learns that there is no more to be had.
                assert!(matches!(reader.next(), Err(StreamError::AfterError { .. })));
                assert!(matches!(
                    reader.read_body_part(&mut [0]),
                    Err(StreamError::AfterError { .. })
                ));
                return error.to_string();
            }
        }
    };
    let ends = "the stream ends here, expected";
    assert_eq!(
        said(0),
        format!("stream offset 0, libxl's header: {ends} 16 more bytes")
    );
    assert_eq!(
        said(15),
        format!("stream offset 15, libxl's header: {ends} 1 more bytes")
    );
    assert_eq!(
        said(16),
        format!("stream offset 16, a libxl record header: {ends} 8 more bytes")
    );
    assert_eq!(
        said(30),
        format!("stream offset 30, libxc's image header: {ends} 18 more bytes")
    );
    assert_eq!(
        said(48),
        format!("stream offset 48, libxc's domain header: {ends} 16 more bytes")
    );
    assert_eq!(
        said(67),
        format!("stream offset 67, a libxc record header: {ends} 5 more bytes")
    );
    assert_eq!(
        said(72),
        format!("stream offset 72, libxc record HVM_CONTEXT: {ends} 16 more bytes")
    );
    assert_eq!(
        said(87),
        format!("stream offset 87, libxc record HVM_CONTEXT: {ends} 1 more bytes")
    );
    assert_eq!(
        said(96),
        format!("stream offset 96, a libxl record header: {ends} 8 more bytes")
    );
}

#[test]
fn input_errors_keep_their_source() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let mut reader = Reader::at_libxl(std::io::Read::chain(&LIBXL[..10], Broken));
    let error = reader.next().unwrap_err();
    assert_eq!(error.to_string(), "stream offset 10, libxl's header: reading failed");
    let source = std::error::Error::source(&error)
        .unwrap()
        .downcast_ref::<std::io::Error>()
        .unwrap();
    assert_eq!(source.kind(), std::io::ErrorKind::ConnectionReset);
}

/// Two entries with data, one without, reserved bits everywhere.
fn page_data_body() -> Vec<u8> {
    let mut body = b"\x03\0\0\0\xef\xbe\xad\xde\
        \x01\0\0\0\0\0\0\0\
        \xff\xff\xff\xff\xff\xff\x7f\xf0\
        \x02\0\0\0\0\0\xf0\x9f"
        .to_vec();
    body.resize(body.len() + PAGE_SIZE, 0x11);
    body.resize(body.len() + PAGE_SIZE, 0x22);
    body
}

#[test]
fn page_data() {
    let body = page_data_body();
    let data = PageData::parse(&body, 100).unwrap();
    assert_eq!(
        (data.count(), data.head().pages(), data.reserved()),
        (3, 2, 0xdead_beef)
    );
    let raw: Vec<u64> = data.raw_entries().collect();
    assert_eq!(raw, [1, 0xf07f_ffff_ffff_ffff, 0x9ff0_0000_0000_0002]);
    let entry = |pfn, page_type, has_data| Entry {
        pfn: Pfn::new(pfn).unwrap(),
        page_type,
        has_data,
    };
    let entries = [
        entry(1, PageType::NoTab, true),
        entry(0xf_ffff_ffff_ffff, PageType::XTab, false),
        entry(2, PageType::L1TabPin, true),
    ];
    assert_eq!(data.entries().collect::<Vec<_>>(), entries);
    assert_eq!((data.entry(1), data.entry(3)), (Some(entries[1]), None));
    assert_eq!(data.pages(), &body[32..]);
    let pages: Vec<Option<u8>> = data
        .entries_with_pages()
        .map(|(_, page)| page.map(|page| page[0]))
        .collect();
    assert_eq!(pages, [Some(0x11), None, Some(0x22)]);

    let fixed = body.first_chunk().unwrap();
    assert_eq!(PageDataHead::size(fixed, body.len() as u32, 100).unwrap(), 32);
    let head = PageDataHead::parse(&body[..32], body.len() as u32, 100).unwrap();
    assert_eq!((head.pages_len(), head.as_bytes()), (2 * PAGE_SIZE, &body[..32]));
}

#[test]
fn page_types() {
    for raw in 0..=u8::MAX {
        let page_type = PageType::new(raw);
        assert_eq!(page_type.is_some(), matches!(raw, 0..=4 | 9..=0xf));
        if let Some(page_type) = page_type {
            assert_eq!((page_type.raw(), page_type.has_data()), (raw, raw < 0xd));
        }
    }
}

#[test]
fn page_data_refusals() {
    let said = |body: &[u8]| PageData::parse(body, 100).unwrap_err().to_string();
    let at = "stream offset 100, libxc record PAGE_DATA";
    assert_eq!(
        said(b""),
        format!("{at}: expected at least 8 bytes for 0 pfns, found 0")
    );
    assert_eq!(
        said(b"\x01\0\0\0\0\0\0"),
        format!("{at}: expected at least 8 bytes for 0 pfns, found 7")
    );
    assert_eq!(
        said(b"\0\0\0\0\0\0\0\0"),
        format!("{at}: expected count of at least 1, found 0x0")
    );
    assert_eq!(
        said(b"\x01\0\0\0\0\0\0\0"),
        format!("{at}: expected at least 16 bytes for 1 pfns, found 8")
    );
    assert_eq!(
        said(b"\xff\xff\xff\xff\0\0\0\0"),
        format!("{at}: expected at least 34359738368 bytes for 4294967295 pfns, found 8")
    );
    let body = page_data_body();
    assert_eq!(
        said(&body[..body.len() - 1]),
        format!("{at}: expected 8224 bytes for 3 pfns and 2 pages, found 8223")
    );
    assert_eq!(
        said(&[&body[..], b"12345678"].concat()),
        format!("{at}: expected 8224 bytes for 3 pfns and 2 pages, found 8232")
    );
    for bad in 5..=8u8 {
        let mut body = page_data_body();
        body[31] = bad << 4;
        assert_eq!(
            said(&body),
            format!(
                "stream offset 124, libxc record PAGE_DATA: expected a page type of 0-4 or 9-0xf \
                 for pfn 0x2 (index 2), found {bad:#x}"
            )
        );
    }
    // Bytes short of the list, though the record is said to be long enough.
    let error = PageDataHead::parse(&body[..31], body.len() as u32, u64::MAX).unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::PageDataShort {
                wanted: 32,
                length: 31,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn writer_pads_with_zeros() {
    let mut writer = Writer::new(Vec::new());
    let header = writer.write_record(Layer::Libxc, libxc::HVM_CONTEXT, b"abc").unwrap();
    assert_eq!(
        header,
        RecordHeader {
            layer: Layer::Libxc,
            kind: 9,
            length: 3,
            offset: 0
        }
    );
    let header = writer
        .write_record(Layer::Libxl, libxl::EMULATOR_CONTEXT, b"12345678")
        .unwrap();
    assert_eq!(header.offset, 16);
    writer.write_record(Layer::Libxl, libxl::END, b"").unwrap();
    writer.write_event(&Event::End).unwrap();
    writer.flush().unwrap();
    assert_eq!(writer.offset(), 40);
    assert_eq!(
        writer.into_inner(),
        b"\x09\0\0\0\x03\0\0\0abc\0\0\0\0\0\x03\0\0\0\x08\0\0\x0012345678\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn writer_holds_records_to_their_length() {
    let mut writer = Writer::new(Vec::new());
    let header = RecordHeader {
        layer: Layer::Libxc,
        kind: libxc::HVM_CONTEXT,
        length: 3,
        offset: 0,
    };
    writer.write_header(&header).unwrap();
    assert_eq!(writer.body_left(), 8);
    assert_eq!(
        writer.write_event(&Event::Record(header)).unwrap_err().to_string(),
        "stream offset 8, libxc record HVM_CONTEXT: expected its body to be complete, 8 bytes of it are left"
    );
    writer.write_body(b"abc").unwrap();
    assert_eq!(
        writer.write_body(b"123456").unwrap_err().to_string(),
        "stream offset 11, libxc record HVM_CONTEXT: expected at most 5 more bytes of its body, got 6"
    );
    writer.write_body(b"PADDI").unwrap();
    let too_long = RecordHeader {
        length: LIBXC_BODY_MAX + 1,
        ..header
    };
    assert!(matches!(
        writer.write_header(&too_long),
        Err(StreamError::TooLong { offset: 16, .. })
    ));
    assert_eq!(writer.into_inner(), b"\x09\0\0\0\x03\0\0\0abcPADDI");
}

#[test]
fn writer_stops_at_an_error() {
    let mut room = [0; 12];
    let mut writer = Writer::new(&mut room[..]);
    let error = writer
        .write_record(Layer::Libxc, libxc::HVM_CONTEXT, b"abcdefgh")
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "stream offset 8, libxc record HVM_CONTEXT: writing failed"
    );
    assert!(matches!(writer.write_body(b"a"), Err(StreamError::AfterError { .. })));
    assert!(matches!(
        writer.write_event(&Event::End),
        Err(StreamError::AfterError { .. })
    ));
}

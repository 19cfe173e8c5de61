//! The figures in Prometheus' text format, version 0.0.4: for each a line of help, one of its type, and its samples.
use std::fmt::{Display, Write};

use xenfold::control::{DedupStats, DedupStatus, IndexStats, IndexStatus, Overview, StoreStatus};
use xenfold::migrations::UnderWay;
use xenfold::page::PAGE_SIZE;
use xenfold::report::Figures;

/// All figures. Names are those of the JSON where they are the same, with Prometheus' units.
pub fn text(overview: &Overview) -> String {
    let mut page = Page::default();
    let status = &overview.status;
    page.gauge("up_seconds", "For how long the daemon has run", status.uptime_s);
    page.gauge("connections", "Callers of the daemon's socket", status.connections);
    store(&mut page, &status.store);
    match &status.index {
        IndexStatus::Running(stats) => index(&mut page, stats),
        IndexStatus::Absent(_) => page.gauge("index_up", "Contents of running guests are looked up", 0),
    }
    match &overview.dedup {
        DedupStatus::Running(stats) => sharing(&mut page, stats),
        DedupStatus::Absent(_) => page.gauge("sharing_up", "This host can share memory of guests", 0),
    }
    migrations(&mut page, &overview.migrations);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Nothing but memory could fail.
        let _ = write!(
            self.text,
            "# HELP xenfold_{name} {help}\n# TYPE xenfold_{name} {kind}\n"
        );
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text += "xenfold_";
        self.text += name;
        for (at, (label, content)) in labels.iter().enumerate() {
            let before = if at == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{label}=\"{}\"", escaped(content));
        }
        let after = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{after} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    /// Since the daemon started.
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }
}

/// A guest's name may be anything.
fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE as u64)
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

fn store(page: &mut Page, store: &StoreStatus) {
    let help = "Contents of guests are kept across migrations";
    let StoreStatus::Open {
        limit_bytes,
        used_bytes,
        contents,
        images,
        templates,
    } = store
    else {
        return page.gauge("store_up", help, 0);
    };
    page.gauge("store_up", help, 1);
    page.gauge("store_used_bytes", "What the contents take on the disk", used_bytes);
    page.gauge("store_limit_bytes", "What they may take", limit_bytes);
    page.gauge("store_contents", "Different pages that are kept", contents);
    page.gauge("store_images", "Images of guests", images);
    page.gauge("store_templates", "Images whose contents stay", templates);
}

fn index(page: &mut Page, stats: &IndexStats) {
    page.gauge("index_up", "Contents of running guests are looked up", 1);
    page.gauge("index_contents", "Different pages that are known", stats.pages);
    page.gauge("index_memory_bytes", "Memory that the index takes", stats.memory_bytes);
    page.gauge("index_limit_bytes", "Memory that it may take", stats.limit_bytes);
    let full = u8::from(stats.full);
    page.gauge("index_full", "There was no room for some contents", full);
    page.counter(
        "index_rounds_total",
        "How often all guests were gone through",
        stats.rounds,
    );
    if let (Some(took), Some(age)) = (stats.last_round_s, stats.last_round_age_s) {
        page.gauge("index_last_round_seconds", "How long the last round took", took);
        page.gauge("index_last_round_age_seconds", "Since the last round ended", age);
    }
    page.gauge(
        "index_pages_per_second",
        "Pages read and hashed in the last second",
        stats.pages_per_s,
    );
    page.gauge(
        "index_limit_pages_per_second",
        "The most that the configuration allows",
        stats.rate_limit_pages_per_s,
    );
    if let Some(percent) = stats.idle_percent {
        let ratio = f64::from(percent) / 100.0;
        page.gauge("processors_idle_ratio", "Of the processors' last second", ratio);
    }
    page.counter("index_answered_total", "Pages given to migrations", stats.answered);
    page.counter(
        "index_stale_total",
        "Pages asked for that were something else by then",
        stats.stale,
    );
    page.head("index_guest_contents", "gauge", "Contents that are found at a guest");
    for guest in stats.guests.iter().filter(|guest| guest.left_out.is_none()) {
        let (domid, group) = (guest.domid.to_string(), guest.group.as_deref().unwrap_or_default());
        let labels = [("domid", domid.as_str()), ("guest", &guest.name), ("group", group)];
        page.sample("index_guest_contents", &labels, guest.pages);
    }
}

fn sharing(page: &mut Page, stats: &DedupStats) {
    let flag = |value: bool| u8::from(value);
    page.gauge("sharing_up", "This host can share memory of guests", 1);
    page.gauge("sharing_enabled", "Equal pages are shared", flag(stats.enabled));
    page.gauge(
        "sharing_returning",
        "What is shared goes back to the guests",
        flag(stats.returning),
    );
    page.gauge(
        "sharing_short",
        "Free memory is below the reserve, so that nothing further is shared",
        flag(stats.short),
    );
    page.gauge("sharing_pages", "Pages that have a frame with others", stats.pages);
    page.gauge("sharing_frames", "Frames that these pages have", stats.frames);
    let saved = bytes(stats.saved_pages);
    page.gauge("sharing_saved_bytes", "Memory spared, by the daemon's table", saved);
    let saved = bytes(stats.xen_saved_pages);
    page.gauge("sharing_xen_saved_bytes", "Memory spared, by Xen", saved);
    page.gauge(
        "sharing_xen_frames",
        "Frames that are shared or about to be, by Xen",
        stats.xen_frames,
    );
    page.gauge("host_free_bytes", "Memory that nobody has", stats.free_bytes);
    page.gauge("sharing_reserve_bytes", "The reserve", stats.reserve_bytes);
    page.gauge(
        "sharing_history_bytes",
        "Memory that the daemon takes to know which pages stay",
        stats.history_bytes,
    );
    page.counter("sharing_shared_total", "Pages that got another's frame", stats.shared);
    page.counter(
        "sharing_broken_total",
        "Pages that were written to after they were shared",
        stats.broken,
    );
    page.counter(
        "sharing_changed_total",
        "Pages that were written to before they were shared",
        stats.changed,
    );
    page.counter("sharing_refused_total", "Pages that Xen did not share", stats.refused);
    page.counter(
        "sharing_returned_total",
        "Pages that were given back on purpose",
        stats.unshared,
    );
    page.counter(
        "sharing_stood_total",
        "How often a processor stood still for want of memory",
        stats.stood,
    );
    page.gauge(
        "sharing_standing",
        "Processors that stand still for want of memory",
        stats.standing,
    );
    page.counter(
        "sharing_arrived_total",
        "Pages that came with a guest and that another guest of its group had",
        stats.arrived,
    );
    page.counter(
        "sharing_arrived_shared_total",
        "Those of them that were shared at once",
        stats.arrived_shared,
    );
    page.gauge(
        "sharing_arrived_waiting",
        "Those of them that are still to be shared",
        stats.arrived_waiting,
    );
    page.head(
        "sharing_guest_pages",
        "gauge",
        "Pages of a guest that have a frame with others",
    );
    for guest in &stats.guests {
        let domid = guest.domid.to_string();
        let labels = [
            ("domid", domid.as_str()),
            ("guest", &guest.name),
            ("group", &guest.group),
        ];
        page.sample("sharing_guest_pages", &labels, guest.shared_pages);
    }
}

/// A figure of a migration: name, help, and where it is.
type OfMigration = (&'static str, &'static str, fn(&Figures) -> f64);

fn migrations(page: &mut Page, under_way: &[UnderWay]) {
    page.gauge(
        "migrations",
        "Guests that are being sent from this host",
        under_way.len(),
    );
    let figures: [OfMigration; 8] = [
        ("migration_elapsed_seconds", "Since it began", |figures| {
            seconds(figures.time_elapsed_ms)
        }),
        (
            "migration_downtime_seconds",
            "For which the guest has stood still",
            |figures| seconds(figures.downtime_ms),
        ),
        ("migration_memory_bytes", "The guest's memory", |figures| {
            figures.memory_total_bytes as f64
        }),
        (
            "migration_processed_bytes",
            "Of the guest's memory, in all passes",
            |figures| figures.memory_processed_bytes as f64,
        ),
        ("migration_stream_bytes", "Of xl's stream", |figures| {
            figures.stream_bytes as f64
        }),
        ("migration_wire_bytes", "Sent for it", |figures| {
            figures.wire_bytes as f64
        }),
        ("migration_pass", "The pass over memory", |figures| {
            f64::from(figures.iteration)
        }),
        ("migration_pass_pages", "Pages of this pass so far", |figures| {
            figures.iteration_pages as f64
        }),
    ];
    for (name, help, of) in figures {
        page.head(name, "gauge", help);
        for migration in under_way {
            let Some(figures) = &migration.figures else { continue };
            let domid = migration.domid.to_string();
            let labels = [
                ("domid", domid.as_str()),
                ("guest", &migration.guest),
                ("host", &migration.host),
            ];
            page.sample(name, &labels, of(figures));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use xenfold::control::{DedupGuest, IndexedGuest, Status};

    use super::*;

    #[test]
    fn every_sample_has_help_and_type_and_comes_once() {
        let overview = Overview {
            status: Status {
                store: StoreStatus::Open {
                    limit_bytes: 4 << 30,
                    used_bytes: 77,
                    contents: 3,
                    images: 2,
                    templates: 1,
                },
                index: IndexStatus::Running(IndexStats {
                    last_round_s: Some(3),
                    last_round_age_s: Some(4),
                    idle_percent: Some(25),
                    guests: vec![
                        IndexedGuest::default(),
                        IndexedGuest {
                            left_out: Some("PV".into()),
                            ..IndexedGuest::default()
                        },
                    ],
                    ..IndexStats::default()
                }),
                ..Status::default()
            },
            dedup: DedupStatus::Running(Box::new(DedupStats {
                saved_pages: 2,
                guests: vec![DedupGuest {
                    domid: 7,
                    name: "we\"b\\\n1".into(),
                    group: "web".into(),
                    shared_pages: 5,
                    left_out: None,
                }],
                ..DedupStats::default()
            })),
            migrations: vec![UnderWay {
                guest: "web-2".into(),
                domid: 9,
                host: "b".into(),
                figures: Some(Figures {
                    time_elapsed_ms: 1500,
                    wire_bytes: 1 << 40,
                    ..Figures::default()
                }),
                ..UnderWay::default()
            }],
        };
        let text = text(&overview);
        let (mut helped, mut typed, mut samples) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                assert!(helped.insert(help.split_once(' ').unwrap().0), "{line}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert!(typed.insert(name), "{line}");
            } else {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                let name = sample.split('{').next().unwrap();
                assert!(typed.contains(name) && helped.contains(name), "{line}");
                assert!(value.parse::<f64>().is_ok() && samples.insert(sample), "{line}");
            }
        }
        for line in [
            "xenfold_store_used_bytes 77",
            "xenfold_processors_idle_ratio 0.25",
            "xenfold_sharing_saved_bytes 8192",
            "xenfold_sharing_guest_pages{domid=\"7\",guest=\"we\\\"b\\\\\\n1\",group=\"web\"} 5",
            "xenfold_migration_elapsed_seconds{domid=\"9\",guest=\"web-2\",host=\"b\"} 1.5",
            "xenfold_migration_wire_bytes{domid=\"9\",guest=\"web-2\",host=\"b\"} 1099511627776",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\n{text}");
        }
        let absent = super::text(&Overview::default());
        for name in ["store_up", "index_up", "sharing_up", "migrations"] {
            assert!(absent.contains(&format!("\nxenfold_{name} 0\n")), "{absent}");
        }
    }
}

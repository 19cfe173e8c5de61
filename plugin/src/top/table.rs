//! The figures as lines of a terminal.
use std::collections::BTreeMap;

use xenfold::config::Size;
use xenfold::control::{DedupStats, DedupStatus, IndexStats, IndexStatus, Overview, StoreStatus};
use xenfold::migrations::UnderWay;
use xenfold::page::PAGE_SIZE;

use crate::daemon_commands::{duration, mib};
use crate::progress;

/// Lines that begin beyond this are of use to nobody, and no wider columns either.
const WIDEST: usize = 400;

/// Marks of a progress bar.
const BAR: u64 = 20;

/// A guest as index and sharing know it.
#[derive(Default)]
struct Row<'a> {
    name: &'a str,
    group: Option<&'a str>,
    contents: Option<u64>,
    shared_pages: Option<u64>,
    note: Option<&'a str>,
}

/// Lines of at most `width` characters, none of which does anything to a terminal.
pub fn table(overview: &Overview, width: usize) -> Vec<String> {
    let width = width.min(WIDEST);
    let status = &overview.status;
    let xen = status
        .xen
        .as_deref()
        .map_or("no Xen".into(), |xen| format!("Xen {xen}"));
    let mut lines = vec![format!(
        "xenfoldd {}, up {}, {xen}",
        status.program,
        duration(status.uptime_s)
    )];
    lines.extend(sharing(&overview.dedup));
    lines.push(scanner(&status.index));
    lines.push(store(&status.store));
    if !overview.migrations.is_empty() {
        lines.push(String::new());
        lines.extend(overview.migrations.iter().map(migration));
    }
    lines.push(String::new());
    lines.extend(guests(overview, width));
    let cut = |line: String| plain(&line).chars().take(width).collect::<String>();
    lines.into_iter().map(|line| cut(line).trim_end().to_owned()).collect()
}

/// Names of guests are theirs to choose, and may hold what moves a cursor or is wider than it counts.
fn plain(text: &str) -> String {
    let safe = |character: char| if matches!(character, ' '..='~') { character } else { '?' };
    text.chars().map(safe).collect()
}

fn pages(count: u64) -> String {
    mib(count.saturating_mul(PAGE_SIZE as u64))
}

fn sharing(dedup: &DedupStatus) -> Vec<String> {
    let stats = match dedup {
        DedupStatus::Running(stats) => stats,
        DedupStatus::Absent(absent) if absent.failed => return vec![format!("sharing  FAILED: {}", absent.reason)],
        DedupStatus::Absent(absent) => return vec![format!("sharing  none: {}", absent.reason)],
    };
    let state = match (stats.enabled, stats.returning) {
        (true, _) if stats.short => "on, but free memory is SHORT",
        (true, _) => "on",
        (false, true) => "off, pages go back",
        (false, false) => "off",
    };
    vec![
        format!(
            "sharing  {state}: {} freed, {} pages in {} frames, {} written/s",
            pages(stats.xen_saved_pages),
            stats.pages,
            stats.frames,
            stats.breaks_per_s
        ),
        memory(stats),
    ]
}

fn memory(stats: &DedupStats) -> String {
    let mut line = format!(
        "memory   {} free, sharing_reserve {}",
        mib(stats.free_bytes),
        Size::new(stats.reserve_bytes)
    );
    if stats.arrived_waiting > 0 {
        line += &format!(", {} pages arrived to share", stats.arrived_waiting);
    }
    line
}

fn scanner(index: &IndexStatus) -> String {
    let stats: &IndexStats = match index {
        IndexStatus::Running(stats) => stats,
        IndexStatus::Absent(absent) if absent.failed => return format!("scanner  FAILED: {}", absent.reason),
        IndexStatus::Absent(absent) => return format!("scanner  none: {}", absent.reason),
    };
    let idle = stats.idle_percent.map_or("?".into(), |percent| percent.to_string());
    let round = match (stats.last_round_age_s, stats.last_round_s) {
        (Some(age), Some(took)) => format!("round of {}, {} ago", duration(took), duration(age)),
        _ => "no round yet".to_owned(),
    };
    let full = if stats.full { ", index FULL" } else { "" };
    format!(
        "scanner  {} of {} pages/s, processors {idle} % idle, {round}{full}",
        stats.pages_per_s, stats.rate_limit_pages_per_s
    )
}

fn store(store: &StoreStatus) -> String {
    match store {
        StoreStatus::Open {
            limit_bytes,
            used_bytes,
            contents,
            images,
            templates,
        } => format!(
            "store    {} of {}, {contents} contents, {images} images, {templates} templates",
            mib(*used_bytes),
            Size::new(*limit_bytes)
        ),
        StoreStatus::Absent(absent) if absent.failed => format!("store    FAILED: {}", absent.reason),
        StoreStatus::Absent(absent) => format!("store    none: {}", absent.reason),
    }
}

fn migration(one: &UnderWay) -> String {
    let route = format!("{} to {}", one.guest, one.host);
    let Some(figures) = one.figures.as_ref().filter(|figures| figures.iteration > 0) else {
        return format!("{route}: waiting for the other host");
    };
    if figures.late.as_ref().is_some_and(|late| late.started) {
        return progress::line(figures);
    }
    let percent = figures.pass_percent();
    let done = percent * BAR / 100;
    let bar: String = (0..BAR).map(|mark| if mark < done { '#' } else { '.' }).collect();
    format!(
        "{route}: pass {} [{bar}] {percent:>3} %, {:.1} MiB/s, {:.0} % saved",
        figures.iteration,
        figures.rate() / f64::from(1 << 20),
        100.0 * figures.reduction()
    )
}

fn guests(overview: &Overview, width: usize) -> Vec<String> {
    let mut rows: BTreeMap<u32, Row> = BTreeMap::new();
    if let IndexStatus::Running(stats) = &overview.status.index {
        for guest in &stats.guests {
            rows.insert(
                guest.domid,
                Row {
                    name: &guest.name,
                    group: guest.group.as_deref(),
                    contents: guest.left_out.is_none().then_some(guest.pages),
                    shared_pages: None,
                    note: guest.left_out.as_deref(),
                },
            );
        }
    }
    if let DedupStatus::Running(stats) = &overview.dedup {
        for guest in &stats.guests {
            let row = rows.entry(guest.domid).or_default();
            row.name = &guest.name;
            row.group = Some(&guest.group);
            row.shared_pages = Some(guest.shared_pages);
            row.note = guest.left_out.as_deref().or(row.note);
        }
    }
    if rows.is_empty() {
        return vec!["no guests are known".into()];
    }
    let longest = |of: fn(&Row) -> usize, most: usize| rows.values().map(of).max().unwrap_or(0).clamp(5, most.max(5));
    let name = longest(|row| row.name.chars().count(), width / 4);
    let group = longest(|row| row.group.unwrap_or_default().chars().count(), width / 5);
    let mut lines = vec![format!(
        "{:>5} {:name$} {:group$} {:>9} {:>11}",
        "domid", "guest", "group", "contents", "shared"
    )];
    for (domid, row) in &rows {
        let dash = || "-".to_owned();
        let contents = row.contents.map_or_else(dash, |count| count.to_string());
        let shared = row.shared_pages.map_or_else(dash, pages);
        lines.push(format!(
            "{domid:>5} {:name$.name$} {:group$.group$} {contents:>9} {shared:>11} {}",
            row.name,
            row.group.unwrap_or("-"),
            row.note.unwrap_or_default()
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use xenfold::control::{Absent, DedupGuest, IndexedGuest, Status};
    use xenfold::report::Figures;

    use super::*;

    fn overview() -> Overview {
        let indexed = |domid, name: &str, group: Option<&str>, left_out: Option<&str>| IndexedGuest {
            domid,
            name: name.into(),
            group: group.map(Into::into),
            pages: 12_000,
            visits: 2,
            left_out: left_out.map(Into::into),
        };
        let shares = |domid, name: &str, left_out: Option<&str>| DedupGuest {
            domid,
            name: name.into(),
            group: "web".into(),
            shared_pages: 30_000,
            left_out: left_out.map(Into::into),
        };
        Overview {
            status: Status {
                program: "1.0".into(),
                uptime_s: 7300,
                xen: Some("4.17".into()),
                store: StoreStatus::Open {
                    limit_bytes: 4 << 30,
                    used_bytes: 3 << 19,
                    contents: 7,
                    images: 1,
                    templates: 0,
                },
                index: IndexStatus::Running(IndexStats {
                    last_round_age_s: Some(30),
                    last_round_s: Some(130),
                    pages_per_s: 1234,
                    rate_limit_pages_per_s: 20_000,
                    idle_percent: Some(50),
                    guests: vec![
                        indexed(3, "web-1", Some("web"), None),
                        indexed(4, "web-22-with-a-name-that-is-long", Some("web"), None),
                        indexed(12, "data\u{1b}[2Jbase", None, Some("PV")),
                    ],
                    ..IndexStats::default()
                }),
                ..Status::default()
            },
            dedup: DedupStatus::Running(Box::new(DedupStats {
                enabled: true,
                pages: 60_000,
                frames: 30_000,
                xen_saved_pages: 30_001,
                free_bytes: 1 << 30,
                reserve_bytes: 256 << 20,
                breaks_per_s: 3,
                arrived_waiting: 512,
                guests: vec![
                    shares(3, "web-1", None),
                    shares(
                        4,
                        "web-22-with-a-name-that-is-long",
                        Some("is being migrated or saved, and is left alone meanwhile"),
                    ),
                ],
                ..DedupStats::default()
            })),
            migrations: vec![
                UnderWay {
                    guest: "web-22".into(),
                    host: "b".into(),
                    figures: Some(Figures {
                        iteration: 2,
                        iteration_pages: 256,
                        memory_total_bytes: 4 << 20,
                        memory_processed_bytes: 20 << 20,
                        time_elapsed_ms: 10_000,
                        stream_bytes: 20 << 20,
                        wire_bytes: 5 << 20,
                        ..Figures::default()
                    }),
                    ..UnderWay::default()
                },
                UnderWay {
                    guest: "mail".into(),
                    host: "c".into(),
                    ..UnderWay::default()
                },
            ],
        }
    }

    #[test]
    fn a_terminal_of_80_columns_shows_all() {
        let expected = "\
xenfoldd 1.0, up 2 h, Xen 4.17
sharing  on: 117.1 MiB freed, 60000 pages in 30000 frames, 3 written/s
memory   1024.0 MiB free, sharing_reserve 256MiB, 512 pages arrived to share
scanner  1234 of 20000 pages/s, processors 50 % idle, round of 2 min, 30 s ago
store    1.5 MiB of 4GiB, 7 contents, 1 images, 0 templates

web-22 to b: pass 2 [#####...............]  25 %, 2.0 MiB/s, 75 % saved
mail to c: waiting for the other host

domid guest                group  contents      shared
    3 web-1                web       12000   117.1 MiB
    4 web-22-with-a-name-t web       12000   117.1 MiB is being migrated or save
   12 data?[2Jbase         -             -           - PV";
        let lines = table(&overview(), 80);
        assert_eq!(lines.join("\n"), expected);
        assert!(lines.iter().all(|line| line.len() <= 80));
    }

    #[test]
    fn any_width_will_do() {
        for width in [0, 1, 7, 20, 79, 81, usize::MAX] {
            let lines = table(&overview(), width);
            assert!(lines.iter().all(|line| line.len() <= width));
        }
        let wide = table(&overview(), usize::MAX).join("\n");
        assert!(wide.contains("that-is-long") && wide.contains("left alone meanwhile"));
    }

    #[test]
    fn what_is_missing_is_said() {
        let absent = |failed, reason: &str| Absent {
            failed,
            reason: reason.into(),
        };
        let overview = Overview {
            dedup: DedupStatus::Absent(absent(true, "built without")),
            status: Status {
                store: StoreStatus::Absent(absent(false, "store_size is 0")),
                ..Status::default()
            },
            ..Overview::default()
        };
        let text = table(&overview, 80).join("\n");
        for says in [
            "sharing  FAILED: built without",
            "scanner  none",
            "store    none: store_size",
            "no guests are known",
            "no Xen",
        ] {
            assert!(text.contains(says), "{says}: {text}");
        }
    }
}

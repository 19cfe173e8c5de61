//! `xenfold dedup report --html`: one page without scripts or anything from elsewhere.
use xenfold::control::{DedupSample, DedupStats, DedupStatus};

use crate::daemon_commands::{duration, mib};
use crate::dedup::{PAGE_BYTES, status_text};

/// Size of the chart, and the room at its left and below for words.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 90.0;
const BELOW: f64 = 24.0;

const STYLE: &str = "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
    pre{background:#f4f4f2;padding:1em;overflow:auto}td,th{padding:.3em .8em;text-align:right}\
    svg text{font-size:12px;fill:#555}table{border-collapse:collapse}td{border:1px solid #fff}";

/// The page as text.
pub fn page(status: &DedupStatus) -> String {
    let mut body = format!(
        "<h1>Memory that guests share</h1>\n<pre>{}</pre>\n",
        escaped(&status_text(status))
    );
    if let DedupStatus::Running(stats) = status {
        body += &format!("<h2>Memory spared over time</h2>\n{}\n", chart(&stats.samples));
        body += &format!("<h2>Pages that two guests have in one frame</h2>\n{}\n", matrix(stats));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>xenfold dedup</title>\
         <style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    )
}

/// Names of guests are theirs to choose.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            other => safe.push(other),
        }
    }
    safe
}

fn chart(samples: &[DedupSample]) -> String {
    let oldest = samples.iter().map(|sample| sample.age_s).max().unwrap_or(0);
    let most = samples.iter().map(|sample| sample.saved_pages).max().unwrap_or(0);
    if samples.len() < 2 || oldest == 0 {
        return "<p>There are no samples yet.</p>".into();
    }
    let x = |age: u64| LEFT + (WIDTH - LEFT) * (1.0 - age as f64 / oldest as f64);
    let y = |pages: u64| 10.0 + (HEIGHT - BELOW - 10.0) * (1.0 - pages as f64 / most.max(1) as f64);
    let points = samples
        .iter()
        .map(|sample| format!("{:.1},{:.1}", x(sample.age_s), y(sample.saved_pages)));
    let points: Vec<String> = points.collect();
    let axis = HEIGHT - BELOW;
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\
         <path d=\"M{LEFT},10V{axis}H{WIDTH}\" fill=\"none\" stroke=\"#999\"/>\
         <polyline points=\"{}\" fill=\"none\" stroke=\"#2a6f97\" stroke-width=\"2\"/>\
         <text x=\"{}\" y=\"16\" text-anchor=\"end\">{}</text><text x=\"{}\" y=\"{axis}\" text-anchor=\"end\">0</text>\
         <text x=\"{LEFT}\" y=\"{}\">{} ago</text><text x=\"{WIDTH}\" y=\"{}\" text-anchor=\"end\">now</text></svg>",
        points.join(" "),
        LEFT - 6.0,
        mib(most.saturating_mul(PAGE_BYTES)),
        LEFT - 6.0,
        HEIGHT - 6.0,
        duration(oldest),
        HEIGHT - 6.0,
    )
}

fn matrix(stats: &DedupStats) -> String {
    let most = stats.pairs.iter().map(|pair| pair.pages).max().unwrap_or(0).max(1);
    let head: String = stats
        .guests
        .iter()
        .map(|guest| format!("<th>{}</th>", escaped(&guest.name)))
        .collect();
    let mut table = format!("<table><tr><th></th>{head}</tr>\n");
    for row in &stats.guests {
        table += &format!("<tr><th>{}</th>", escaped(&row.name));
        for column in &stats.guests {
            let domids = [row.domid.min(column.domid), row.domid.max(column.domid)];
            let pair = stats.pairs.iter().find(|pair| pair.domids == domids);
            let pages = pair.map_or(0, |pair| pair.pages);
            let shade = pages as f64 / most as f64;
            table += &format!("<td style=\"background:rgba(42,111,151,{shade:.2})\">{pages}</td>");
        }
        table += "</tr>\n";
    }
    table + "</table>"
}

#[cfg(test)]
mod tests {
    use xenfold::control::{DedupGuest, DedupPair};

    use super::*;

    #[test]
    fn the_page_has_a_chart_and_a_table_and_no_code_of_guests() {
        let guest = |domid, name: &str| DedupGuest {
            domid,
            name: name.into(),
            ..DedupGuest::default()
        };
        let sample = |age_s, saved_pages| DedupSample {
            age_s,
            saved_pages,
            ..DedupSample::default()
        };
        let stats = DedupStats {
            guests: vec![guest(4, "<script>"), guest(2, "web-1")],
            pairs: vec![DedupPair {
                domids: [2, 4],
                pages: 77,
            }],
            samples: vec![sample(60, 0), sample(30, 256), sample(0, 512)],
            ..DedupStats::default()
        };
        let page = page(&DedupStatus::Running(Box::new(stats)));
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert_eq!(page.matches(">77</td>").count(), 2);
        for says in ["90.0,196.0 425.0,103.0 760.0,10.0", "2.0 MiB", "60 s ago"] {
            assert!(page.contains(says), "{says}: {page}");
        }
        assert!(super::page(&DedupStatus::default()).contains("sharing: none"));
    }
}

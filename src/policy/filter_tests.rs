use proptest::prelude::*;

use super::*;
use crate::policy::kept::Kept;
use crate::policy::model::Builder;

const INTERVAL: Duration = Duration::from_millis(50);

fn set(bound: u64, runs: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::new(bound);
    runs.iter().for_each(|(start, end)| set.insert_run(*start..*end));
    set
}

fn pfns(run: std::ops::Range<u64>) -> Vec<Pfn> {
    run.filter_map(Pfn::new).collect()
}

/// A model of a guest with 4096 pages that writes pages 1000 to 1999 all the time.
fn model() -> Model {
    let mut builder = Builder::new(4096, 4096, INTERVAL);
    for _ in 0..40 {
        builder.sample(&set(4096, &[(1000, 2000)]));
    }
    builder.finish()
}

/// The first pass over 4096 pages, 100 ms a record, peeked at in its second half. Returns the pages held.
fn first_pass(filter: &mut Filter, written: &PageSet) -> u64 {
    let mut held = 0;
    for record in 0..4 {
        let now = Duration::from_millis(100 * record);
        let pages = pfns(record * 1024..(record + 1) * 1024);
        let peek = (record == 2).then_some(written);
        held += filter.hold(now, &pages, peek).iter().filter(|held| **held).count() as u64;
        filter.sent(now, record * 1024, record * 1024 * 4096);
        assert!(filter.release(100).is_empty());
    }
    held
}

#[test]
fn what_is_dirty_again_is_held_without_a_model() {
    let mut filter = Filter::new(None, 4096, 4096);
    let held = first_pass(&mut filter, &set(4096, &[(0, 10), (3000, 3100)]));
    assert_eq!((held, filter.held_pages(), filter.pass()), (100, 100, 1));
    assert!(!filter.model_holds());
    // A pass later it is what it is now that counts.
    let answers = filter.hold(
        Duration::from_secs(1),
        &pfns(3000..3100),
        Some(&set(4096, &[(3000, 3001)])),
    );
    assert_eq!(filter.pass(), 2);
    assert!(answers[0]);
}

#[test]
fn what_the_model_forecasts_is_held_and_what_turns_quiet_is_released() {
    let mut filter = Filter::new(Some(model()), 4096, 4096);
    assert!(filter.model_holds());
    let all = set(4096, &[(1000, 2000)]);
    let held = first_pass(&mut filter, &all);
    assert_eq!(held, 1000);
    assert_eq!(filter.held_pages(), 1000);
    let downtime = filter.expected_downtime(Duration::from_millis(400));
    assert!(
        downtime > Duration::from_millis(20) && downtime < Duration::from_secs(1),
        "{downtime:?}"
    );
    // Pages 1900 to 1999 are not written any more. Each pass is one record, and so its last.
    let mut released = Vec::new();
    for pass in 2..=5 {
        let now = Duration::from_millis(pass * 2000);
        filter.hold(now, &pfns(1000..1900), Some(&set(4096, &[(1000, 1900)])));
        loop {
            let more = filter.release(7);
            assert!(more.len() <= 7);
            if more.is_empty() {
                break;
            }
            released.extend(more.iter().map(|pfn| pfn.get()));
        }
    }
    released.sort();
    assert_eq!(released, (1900..2000).collect::<Vec<_>>());
    assert_eq!(filter.held_pages(), 900);
}

#[test]
fn what_turns_dirty_while_it_waits_to_be_sent_is_not_sent() {
    let mut filter = Filter::new(Some(model()), 4096, 4096);
    first_pass(&mut filter, &set(4096, &[(1000, 2000)]));
    // The last record of the second pass: those above are not written any more.
    filter.hold(
        Duration::from_secs(2),
        &pfns(1000..1100),
        Some(&set(4096, &[(1000, 1100)])),
    );
    let first = filter.release(100);
    assert_eq!(first.len(), 100);
    let left: Vec<u64> = (1100..2000)
        .filter(|page| !first.iter().any(|pfn| pfn.get() == *page))
        .collect();
    let dirty = *left.last().unwrap();
    filter.peeked(Duration::from_secs(3), &set(4096, &[(1000, 1100), (dirty, dirty + 1)]));
    let then = filter.release(4096);
    assert!(then.len() == left.len() - 1 && then.iter().all(|pfn| pfn.get() != dirty));
    assert!(filter.held_pages() >= 1);
}

#[test]
fn a_model_that_peeks_refute_is_dropped() {
    let mut filter = Filter::new(Some(model()), 4096, 4096);
    filter.hold(Duration::from_millis(10), &pfns(0..1000), None);
    filter.hold(
        Duration::from_secs(2),
        &pfns(1000..2000),
        Some(&set(4096, &[(2500, 3500)])),
    );
    assert!(!filter.model_holds());
}

#[test]
fn a_model_of_another_size_is_not_used() {
    assert!(!Filter::new(Some(model()), 4097, 4096).model_holds());
}

/// What a migration leaves of a guest that writes pages 1000 to 2999 in a circle of 10 s.
fn circled() -> Kept {
    let mut filter = Filter::new(None, 4096, 4096);
    let mut dirty = PageSet::new(4096);
    for tick in 0..300 {
        let first = 1000 + tick * 20 % 2000;
        dirty.insert_run(first..first + 20);
        let page = Pfn::new(tick * 10).unwrap();
        filter.hold(Duration::from_millis(tick * 100), &[page], Some(&dirty));
        if tick % 100 == 99 {
            // A pass of xl's ends.
            filter.previous = None;
            filter.begin_pass(tick as f64 / 10.0, 1);
            dirty.clear();
        }
    }
    filter.learnt()
}

#[test]
fn pages_known_from_an_earlier_migration_are_held_where_they_are_still_written() {
    let kept = circled();
    assert_eq!(kept.pages(), 2000);
    let begin = |samples: &[(u64, u64)]| {
        let mut builder = Builder::after(kept.clone(), INTERVAL);
        for (start, end) in samples {
            builder.sample(&set(4096, &[(*start, *end)]));
        }
        Filter::new(Some(builder.finish()), 4096, 4096)
    };
    // Three seconds of the same circle: a page that was not seen in them is known all the same.
    let seen: Vec<(u64, u64)> = (0..60).map(|sample| (2000 + sample * 10, 2010 + sample * 10)).collect();
    let mut filter = begin(&seen);
    assert!(filter.known.is_some(), "{}", filter.forecast.earlier);
    filter.rate.pages = 400.0;
    let held = filter.hold(Duration::ZERO, &pfns(2700..2800), None);
    assert!(held.iter().all(|held| *held), "{:?}", filter.ahead());
    let quiet = filter.hold(Duration::ZERO, &pfns(3100..3200), None);
    assert_eq!(quiet, [false; 100]);
    // It is passed on, whether it was seen this time or not.
    assert_eq!(filter.learnt().pages(), 2000);
    // The guest does nothing, or something else: that counts once it is migrated, and all of that is forgotten.
    for (samples, written) in [([(0, 0); 40], (0, 0)), ([(100, 110); 40], (100, 110))] {
        let mut filter = begin(&samples);
        assert!(filter.known.is_some());
        filter.hold(Duration::ZERO, &pfns(0..10), None);
        filter.hold(Duration::from_secs(10), &pfns(10..20), Some(&set(4096, &[written])));
        assert!(filter.known.is_none(), "{}", filter.forecast.earlier);
        assert!(filter.learnt().pages() <= 10);
    }
}

#[test]
fn a_place_that_is_found_while_held_pages_go_keeps_back_those_that_are_due() {
    // 20 pages of a circle of 2000 each tenth of a second, of which the first pass has seen one and a half.
    let run = |tick: u64| (1000 + tick * 20 % 2000, 1020 + tick * 20 % 2000);
    let mut filter = Filter::new(None, 4096, 4096);
    let mut dirty = PageSet::new(4096);
    for tick in 0..150 {
        dirty.insert_run(run(tick).0..run(tick).1);
        let page = Pfn::new(tick * 10).unwrap();
        filter.hold(Duration::from_millis(tick * 100), &[page], Some(&dirty));
    }
    filter.begin_pass(15.0, 1);
    dirty.clear();
    filter.held.insert_run(1000..3000);
    (filter.held_pages, filter.rate.pages) = (2000, 1000.0);
    filter.end_pass(15.0);
    assert!(
        !filter.has_place() && filter.queue.len() > 1900,
        "{}",
        filter.queue.len()
    );
    let (mut gone, mut soon) = (std::collections::HashMap::new(), 0);
    for tick in 150..190 {
        let (first, end) = run(tick);
        let before = (first..end).filter_map(|page| gone.get(&page));
        soon += before.filter(|gone| tick - **gone < 10).count();
        dirty.insert_run(first..end);
        filter.peeked(Duration::from_millis(tick * 100 + 100), &dirty);
        gone.extend(filter.release(50).iter().map(|pfn| (pfn.get(), tick)));
    }
    assert!(filter.has_place());
    // The first second's, before it was found.
    assert!(soon <= 200 && gone.len() > 1000, "{soon} of {}", gone.len());
}

/// A migration of a guest that goes on in a circle of 2000 pages, 200 a second, from a page of it on for so many seconds, all of it
/// in xl's first pass; with a pass's end behind it.
fn migrate(kept: Option<Kept>, from: u64, seconds: u64) -> Filter {
    let builder = kept.map(|kept| Builder::after(kept, INTERVAL).finish());
    let mut filter = Filter::new(builder, 4096, 4096);
    let mut dirty = PageSet::new(4096);
    for tick in 0..seconds * 10 {
        let first = 1000 + (from + tick * 20) % 2000;
        dirty.insert_run(first..first + 20);
        filter.hold(
            Duration::from_millis(tick * 100),
            &[Pfn::new(tick).unwrap()],
            Some(&dirty),
        );
    }
    filter.previous = None;
    filter.begin_pass(seconds as f64, 1);
    filter
}

/// How often the order of a circle goes back, of 2000 pages.
fn steps_back(kept: &Kept) -> usize {
    let ages: Vec<u8> = (1000..3000).map(|page| kept.ages.bytes()[page]).collect();
    assert!(ages.iter().all(|age| *age > 0));
    (0..2000).filter(|at| ages[(at + 1) % 2000] > ages[*at]).count()
}

#[test]
fn an_order_survives_migrations_that_are_shorter_than_its_circle() {
    let mut kept = migrate(None, 0, 10).learnt();
    assert_eq!(steps_back(&kept), 1);
    let mut from = 600;
    for seconds in [6, 4, 8, 3] {
        let filter = migrate(Some(kept), from, seconds);
        assert!(filter.circle.as_ref().is_some_and(Circle::is_earlier), "{seconds}");
        kept = filter.learnt();
        assert_eq!(steps_back(&kept), 1, "{seconds}");
        from += 900;
    }
}

#[test]
fn an_order_is_replaced_only_where_the_guest_writes_in_another() {
    let is_earlier = |filter: &Filter| filter.circle.as_ref().is_some_and(Circle::is_earlier);
    let kept = migrate(None, 0, 10).learnt();
    assert!(is_earlier(&migrate(Some(kept.clone()), 700, 5)));
    assert!(
        is_earlier(&migrate(Some(kept.clone()), 700, 0)),
        "nothing speaks against it"
    );
    // All over the same pages.
    let mut filter = Filter::new(Some(Builder::after(kept, INTERVAL).finish()), 4096, 4096);
    let mut dirty = PageSet::new(4096);
    for tick in 0..50 {
        let pages = (0..20).map(|page| 1000 + (tick * 20 + page) * 997 % 2000);
        pages.for_each(|page| dirty.insert_run(page..page + 1));
        filter.hold(
            Duration::from_millis(tick * 100),
            &[Pfn::new(tick).unwrap()],
            Some(&dirty),
        );
    }
    filter.begin_pass(5.0, 1);
    assert!(!is_earlier(&filter) && !filter.has_place());
}

#[test]
fn all_of_a_true_order_waits_in_later_passes_until_the_guest_is_found_in_it() {
    let mut filter = migrate(Some(migrate(None, 0, 10).learnt()), 700, 17);
    assert!(
        !filter.has_place(),
        "it has been everywhere, and nothing new was written for long"
    );
    filter.rate.pages = 1e6;
    let circle = pfns(1000..3000);
    let held = |filter: &mut Filter, at: u64, peek| {
        let held = filter.hold(Duration::from_millis(at), &circle[..1024], peek);
        filter.previous = None;
        held.iter().filter(|held| **held).count()
    };
    assert_eq!(held(&mut filter, 17_000, None), 1024);
    let mut dirty = PageSet::new(4096);
    dirty.insert_run(1100..1200);
    filter.peeked(Duration::from_millis(17_500), &dirty);
    assert!(filter.has_place());
    filter.previous = Pfn::new(10);
    let held = held(&mut filter, 17_600, None);
    assert!((100..200).contains(&held), "{held}");
}

proptest! {
    /// Whatever xl offers and peeks show: dirty pages are held, held ones are released once, and none but those.
    #[test]
    fn what_is_held_is_known(
        records in proptest::collection::vec(
            (proptest::collection::btree_set(0u64..3000, 0..60), 0u64..3000, any::<bool>(), 0u64..5000), 1..40),
        with_model in any::<bool>(),
    ) {
        let bound = 2048;
        let model = with_model.then(|| {
            let mut builder = Builder::new(bound, bound, INTERVAL);
            (0..20).for_each(|sample| {
                builder.sample(&set(bound, &[(sample * 50, sample * 50 + 100)]));
            });
            builder.finish()
        });
        let mut filter = Filter::new(model, bound, bound);
        let mut held = std::collections::BTreeSet::new();
        let mut now = Duration::ZERO;
        for (pages, from, peeked, ms) in records {
            now += Duration::from_millis(ms);
            let pages: Vec<Pfn> = pages.into_iter().filter_map(Pfn::new).collect();
            let peek = peeked.then(|| set(bound, &[(from, from + 300)]));
            let answers = filter.hold(now, &pages, peek.as_ref());
            prop_assert_eq!(answers.len(), pages.len());
            for (pfn, hold) in pages.iter().zip(&answers) {
                let dirty = peek.as_ref().is_some_and(|peek| peek.contains(*pfn));
                prop_assert!(*hold || !dirty);
                if *hold { held.insert(*pfn); } else { held.remove(pfn); }
            }
            prop_assert_eq!(filter.held_pages(), held.len() as u64);
            for pfn in filter.release(1000) {
                prop_assert!(held.remove(&pfn));
            }
            prop_assert_eq!(filter.held_pages(), held.len() as u64);
            filter.sent(now, ms, ms * 4096);
            filter.expected_downtime(now);
        }
    }
}

#[test]
fn a_short_pass_is_the_last_but_one() {
    // A second's worth of pages is held.
    let mut filter = Filter::new(None, 40_000, 40_000);
    filter.pass = 2;
    filter.held.insert_run(0..30_000);
    let held = |writes| -> Vec<(Pfn, f32)> { (0..30_000).filter_map(Pfn::new).map(|pfn| (pfn, writes)).collect() };
    assert!(!filter.next_is_last(0.01, &held(0.1)), "without a limit");
    filter.limit_downtime(Duration::from_millis(300));
    assert!(filter.next_is_last(0.01, &held(0.1)));
    assert!(!filter.next_is_last(0.01, &held(0.2)), "60 are written meanwhile");
    assert!(!filter.next_is_last(0.02, &held(0.1)));
    filter.dirty.insert_run(0..20);
    assert!(
        !filter.next_is_last(0.01, &held(0.1)),
        "20 are known to be, and 30 are expected"
    );
    filter.dirty.clear();
    filter.limit_downtime(Duration::from_secs(2));
    assert!(
        !filter.next_is_last(0.01, &held(0.1)),
        "all can go while it stands still"
    );
}

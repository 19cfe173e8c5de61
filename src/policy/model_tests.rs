use super::*;

const INTERVAL: Duration = Duration::from_millis(50);

fn written(runs: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::new(1024);
    runs.iter().for_each(|(start, end)| set.insert_run(*start..*end));
    set
}

/// A guest of 256 regions of 4 pages that writes pages 0 to 3 and 100 to 103 by turns, and page 8 always.
fn turns() -> Model {
    let mut builder = Builder::new(1024, 1024, INTERVAL);
    for turn in 0..40 {
        let region = if turn % 2 == 0 { (0, 4) } else { (100, 104) };
        assert!(builder.sample(&written(&[region, (8, 9)])));
    }
    builder.finish()
}

#[test]
fn states_follow_each_other_as_seen() {
    let model = turns();
    assert_eq!((model.states(), model.watched()), (2, Duration::from_secs(2)));
    let (even, odd) = (written(&[(0, 4), (8, 9)]), written(&[(100, 104), (8, 9)]));
    let (a, b) = (model.identify(&even).unwrap(), model.identify(&odd).unwrap());
    assert_eq!(model.forecast(a, INTERVAL), odd);
    assert_eq!(model.forecast(b, INTERVAL), even);
    assert_eq!(
        model.forecast(a, Duration::from_secs(10)),
        written(&[(0, 4), (8, 9), (100, 104)])
    );
    assert!(model.forecast(a, INTERVAL / 2).is_empty());
    assert_eq!(model.identify(&written(&[(500, 501)])), None);
}

#[test]
fn pages_that_are_rarely_written_are_in_no_working_set() {
    let mut builder = Builder::new(1024, 1024, INTERVAL);
    for sample in 0..40 {
        builder.sample(&written(&[(0, 4), (600 + sample, 601 + sample)]));
    }
    let model = builder.finish();
    assert_eq!(model.forecast(0, Duration::from_secs(1)), written(&[(0, 4)]));
}

#[test]
fn a_guest_that_changes_its_ways_is_noticed() {
    let model = turns();
    let second = Duration::from_secs(1);
    let same = model.check(&written(&[(0, 4), (8, 9), (100, 104)]), second);
    assert!(same.holds(), "{same:?}");
    let mut builder = Builder::new(1024, 1024, INTERVAL);
    for _ in 0..40 {
        builder.sample(&written(&[(0, 400)]));
    }
    let model = builder.finish();
    assert!(model.check(&written(&[(0, 400)]), second).holds());
    assert!(!model.check(&written(&[(500, 900)]), second).holds());
    assert!(!model.check(&written(&[(0, 50)]), second).holds());
}

#[test]
fn a_model_stays_within_its_memory() {
    let bound = 1 << 16;
    let mut builder = Builder::new(bound, bound, INTERVAL);
    let mut random = 1u64;
    for _ in 0..200 {
        let mut set = PageSet::new(bound);
        for _ in 0..bound / 2 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            set.insert(crate::page::Pfn::new(random >> 48).unwrap());
        }
        assert!(builder.sample(&set));
        assert!(builder.packed_bytes <= bound);
    }
    let model = builder.finish();
    let sets: usize = model.states.iter().map(|state| state.working_set.len()).sum();
    assert!(sets as u64 + bound <= 2 * bound);
}

#[test]
fn no_more_samples_than_it_can_take() {
    let mut builder = Builder::new(64, 64, INTERVAL);
    for _ in 0..MOST_SAMPLES {
        assert!(builder.sample(&PageSet::new(64)));
    }
    assert!(!builder.sample(&PageSet::new(64)));
    let model = builder.finish();
    assert!(model.check(&PageSet::new(64), INTERVAL).holds());
    assert_eq!(model.age(3), None);
}

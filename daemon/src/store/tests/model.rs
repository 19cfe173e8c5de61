//! Any sequence of calls against maps.
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Put(bool, u64, u64),
    Read(bool, u64, u64),
    Save(bool, u8, u64, u64),
    Remove(bool, u8),
    Gc,
    Verify,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0u64..800, 1u64..200);
    prop_oneof![
        6 => (any::<bool>(), range()).prop_map(|(b, (first, count))| Step::Put(b, first, count)),
        4 => (any::<bool>(), range()).prop_map(|(b, (first, count))| Step::Read(b, first, count)),
        2 => (any::<bool>(), 0u8..4, range()).prop_map(|(b, guest, (first, count))| Step::Save(b, guest, first, count)),
        1 => (any::<bool>(), 0u8..4).prop_map(|(b, guest)| Step::Remove(b, guest)),
        1 => Just(Step::Gc),
        1 => Just(Step::Verify),
        1 => Just(Step::Reopen),
    ]
}

#[derive(Default)]
struct Model {
    /// Contents that may be held: put at some time. The bound decides whether they still are.
    put: BTreeSet<u64>,
    images: BTreeMap<u8, (u64, u64)>,
}

/// `roomy`: nothing may ever be missing that was put and not collected.
fn run(steps: Vec<Step>, limit_bytes: u64, roomy: bool) {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Some(open(folder.path(), limit_bytes));
    let groups = |store: &Store| [store.group("a", &key(1)).unwrap(), store.group("b", &key(1)).unwrap()];
    let mut both = groups(store.as_ref().unwrap());
    let mut models = [Model::default(), Model::default()];
    for (time, step) in steps.into_iter().enumerate() {
        match step {
            Step::Put(b, first, count) => {
                let (group, model) = (&both[usize::from(b)], &mut models[usize::from(b)]);
                let wanted = group.wanted(&ids(first..first + count));
                let new = put(group, first..first + count).unwrap();
                let wanted = wanted.into_iter().filter(|wanted| *wanted).count();
                assert!(if roomy { new == wanted } else { new <= count as usize });
                model.put.extend(first..first + count);
            }
            Step::Read(b, first, count) => {
                let (group, model) = (&both[usize::from(b)], &models[usize::from(b)]);
                let came = read_right(group, first..first + count);
                let may = model.put.range(first..first + count).count();
                assert!(if roomy { came == may } else { came <= may });
            }
            Step::Save(b, guest, first, count) => {
                let (group, model) = (&both[usize::from(b)], &mut models[usize::from(b)]);
                let image = image(&format!("guest{guest}"), time as u64, first..first + count);
                group.save_image(&image).unwrap();
                model.images.insert(guest, (first, count));
                assert_eq!(group.image(&image.guest).unwrap(), Some(image));
            }
            Step::Remove(b, guest) => {
                let removed = both[usize::from(b)].remove_image(&format!("guest{guest}")).unwrap();
                let known = models[usize::from(b)].images.remove(&guest).is_some();
                assert!(if roomy { removed == known } else { removed <= known });
            }
            Step::Gc => {
                store.as_ref().unwrap().gc().unwrap();
                for model in &mut models {
                    let named = |n: &u64| {
                        model
                            .images
                            .values()
                            .any(|(first, count)| (*first..first + count).contains(n))
                    };
                    model.put = model.put.iter().copied().filter(named).collect();
                }
            }
            Step::Verify => assert_eq!(store.as_ref().unwrap().verify().unwrap().damaged, 0),
            Step::Reopen => {
                drop(store.take());
                drop(both);
                store = Some(open(folder.path(), limit_bytes));
                both = groups(store.as_ref().unwrap());
            }
        }
        let stats = store.as_ref().unwrap().stats();
        assert!(stats.used_bytes <= limit_bytes && allocated(folder.path()) <= limit_bytes);
        assert_eq!(
            stats.used_bytes,
            stats.groups.iter().map(|group| group.bytes).sum::<u64>()
        );
        for (group, model) in both.iter().zip(&models) {
            let held = group.lookup_keys().len();
            assert!(if roomy {
                held == model.put.len()
            } else {
                held <= model.put.len()
            });
            for info in group.images().unwrap().iter().filter(|_| roomy) {
                let guest = info.guest.trim_start_matches("guest").parse().unwrap();
                assert_eq!(info.pages, model.images[&guest].1);
            }
        }
    }
    drop(both);
    assert_eq!(damaged(store.as_ref().unwrap()), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_while_there_is_room(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, 64 * MIB, true);
    }

    #[test]
    fn nothing_is_wrong_when_there_is_none(steps in prop::collection::vec(step(), 1..60)) {
        run(steps, 8 * MIB, false);
    }
}

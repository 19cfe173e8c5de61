//! Agents that are killed while pages follow, and those that go on for them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use xenfold::engine::source::{self, Ending, Following};
use xenfold::engine::takeover::{self, Start, TakeOver};
use xenfold::engine::{GuestPaging, JournalFile, LinkEnds, refuse};
use xenfold::late::Mode;
use xenfold::late::journal::{Facts, Journal};
use xenfold::wire::Hello;

use crate::cuts::Cut;
use crate::hosts::mortal::{Handled, Kept, Mortal};
use crate::hosts::{
    self, DestinationXl, Fate, Heir, Hook, ImageFrames, Listening, Plan, SourceXl, kind, migrate, pass,
};
use crate::living::{Dice, Memory, SourceFrames};
use crate::paged::{Faults, Paged};
use crate::{Case, compare, completed, long, plan};

/// What `xenfold receive --rejoin` does at the destination when the agent was killed. Each is killed in its turn, after so
/// many acts; the last one is not.
fn heir(folder: &Path, plan: &Plan, guest: &Paged, mut lives: Vec<i64>) -> (Heir, Arc<Mutex<Vec<String>>>) {
    lives.reverse();
    let (path, guest) = (folder.join("journal"), guest.clone());
    let (image, xl, lives) = (plan.image.clone(), plan.destination_xl.clone(), Mutex::new(lives));
    let errors: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = errors.clone();
    let heir = move |ends: LinkEnds, all: &Listening| {
        let (journal, found) = match Journal::take(&path) {
            Ok(taken) => taken,
            Err(error) => {
                // Nobody reads that when the connection is cut, too.
                drop(std::thread::spawn(move || refuse(ends, &error.to_string())));
                return;
            }
        };
        let life = Mortal::after(lives.lock().pop().unwrap_or(i64::MAX));
        life.count();
        let journal = Kept::new(JournalFile::taken(journal), life.clone());
        let (all, all_again) = (all.clone(), all.clone());
        life.on_death(move || all.end());
        let listen = all_again.listen(Some(life.clone()));
        let xl = xl.clone();
        let look = move |_| {
            let until = Instant::now() + Duration::from_secs(20);
            while xl.lock().is_none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
            match *xl.lock() {
                Some(DestinationXl::Running) => Start::Started,
                other => Start::Unknown(format!("{other:?}")),
            }
        };
        let taking = TakeOver {
            found,
            journal: Box::new(journal),
            paging: Box::new(Handled {
                paging: guest.clone(),
                by: life.clone(),
            }),
            frames: Some(Box::new(ImageFrames {
                image: image.clone(),
                fault: hosts::FrameFault::None,
            })),
            hello: Hello {
                late: true,
                rejoins: true,
                ..Hello::default()
            },
            listen,
            first: Some(ends),
            look: Box::new(look),
            watching: None,
            program: "heir".into(),
            usage: || (1, 2),
        };
        let noted = noted.clone();
        std::thread::spawn(move || {
            if let Err(error) = takeover::run(taking)
                && !life.is_dead()
            {
                noted.lock().push(error.to_string());
            }
            // The process ends.
            life.kill();
        });
    };
    (Arc::new(heir), errors)
}

/// A plan whose destination's agents are killed after so many acts each.
fn with_deaths(plan: Plan, guest: &Paged, folder: &Path, lives: &[i64]) -> (Plan, Mortal, Arc<Mutex<Vec<String>>>) {
    let (first, others) = lives.split_first().unwrap();
    let life = Mortal::after(*first);
    let (heir, errors) = heir(folder, &plan, guest, others.to_vec());
    let facts = Facts {
        token: hosts::TOKEN.into(),
        content_key: hosts::key().hex(),
        ..Facts::default()
    };
    let journal = JournalFile::new(folder.join("journal"), || Ok(facts));
    let paging: Box<dyn GuestPaging> = Box::new(Handled {
        paging: guest.clone(),
        by: life.clone(),
    });
    let plan = Plan {
        paging: Some(paging),
        journal: Some(Box::new(Kept::new(journal, life.clone()))),
        agent: Some((life.clone(), heir)),
        again: Some(Box::new(|_| Some((pass(), pass())))),
        ..plan
    };
    (plan, life, errors)
}

/// Whenever the agent that holds the guest is killed, and whoever goes on for it: the guest finds its memory, is let go in
/// the end, and the source's copy goes only then.
#[test]
fn an_agent_that_is_killed_has_an_heir() {
    let (mut killed, mut whole) = (0, 0);
    for seed in 0..40 {
        let mut dice = Dice(seed ^ 0xdead);
        let case = Case {
            seed,
            pages: 800 + dice.throw(3000),
            mode: [Mode::Postcopy, Mode::Hybrid][dice.throw(2) as usize],
            now_pages: dice.throw(60) as usize,
            touches: dice.throw(600),
            faults: Faults {
                busy: [0, 0, 7][dice.throw(3) as usize],
                destroyed_after: (dice.throw(6) == 0).then(|| dice.throw(300)),
                ..Faults::default()
            },
            ..Case::default()
        };
        let lives: Vec<i64> = (0..1 + dice.throw(3))
            .map(|_| {
                let most = [10, 400, 4000][dice.throw(3) as usize];
                dice.throw(most) as i64
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let (plan, life, errors) = with_deaths(plan, &guest, folder.path(), &lives);
        let outcome = migrate(plan);
        assert_eq!(*errors.lock(), [] as [String; 0], "{lives:?}");
        let (_, _, wrong) = guest.story();
        assert!(wrong.is_empty(), "{lives:?}: {wrong:?}");
        killed += u64::from(life.is_dead());
        if matches!(outcome.ending, Ending::Completed { .. }) {
            completed(&outcome);
            if !guest.is_gone() {
                compare(&memory, &guest, case.pages);
            }
            let journals = std::fs::read_dir(folder.path()).unwrap().count();
            // The last one may still be about to remove it.
            assert!(journals <= 1, "{lives:?}");
            whole += u64::from(life.is_dead());
        } else {
            // Before the guest was let go: xl has destroyed what it had, and nothing runs twice.
            assert_ne!(
                outcome.destination_xl,
                DestinationXl::Running,
                "{lives:?}: {:?}",
                outcome.ending
            );
            assert_ne!(outcome.source_xl, SourceXl::Gone, "{lives:?}");
        }
    }
    assert!(
        killed > 25 && whole > 20,
        "{killed} were killed, {whole} guests went on"
    );
}

/// The agent is killed at one frame after another.
#[test]
fn an_agent_is_killed_at_any_frame() {
    for (to_destination, kind, nth, before) in [
        (true, kind::LATE, 0, true),
        (true, kind::LATE, 20, false),
        (false, kind::WANT, 3, true),
        (false, kind::STARTED, 0, true),
        (false, kind::STARTED, 0, false),
        (false, kind::PONG, 10, true),
        (false, kind::XL, 2, true),
        (false, kind::XL, 2, false),
        (false, kind::FIGURES, 0, true),
    ] {
        let case = long();
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let (plan, life, errors) = with_deaths(plan, &guest, folder.path(), &[i64::MAX]);
        let journal = folder.path().join("journal");
        let outcome = migrate(plan.hooks(move |_| {
            let hook = move |forth: bool| -> Hook {
                let (journal, life) = (journal.clone(), life.clone());
                Box::new(move |frame: &mut hosts::OnTheWay| {
                    let here = forth == to_destination && frame.kind == kind && frame.nth >= nth;
                    // Before that there is nothing to go on with: the guest is not let go yet.
                    match here && journal.exists() {
                        true if before => {
                            life.kill();
                            Fate::CutBefore
                        }
                        true => {
                            let life = life.clone();
                            std::thread::spawn(move || life.kill());
                            Fate::CutAfter
                        }
                        false => Fate::Pass,
                    }
                })
            };
            (hook(true), hook(false))
        }));
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        assert_eq!(*errors.lock(), [] as [String; 0], "{kind}");
        assert_eq!(late.missing, 0, "{late:?}");
    }
}

/// A plan whose source's agent is killed at some frame once the guest has been let go.
fn with_dying_source(plan: Plan, memory: &Arc<Mutex<Memory>>, folder: &Path, cut: Cut) -> (Plan, Mortal) {
    let (life, path) = (Mortal::after(i64::MAX), folder.join("source"));
    let facts = Facts {
        token: hosts::TOKEN.into(),
        content_key: hosts::key().hex(),
        ..Facts::default()
    };
    let journal = JournalFile::new(path.clone(), || Ok(facts));
    let memory = memory.clone();
    let follower = move |connect| {
        let (journal, found) = Journal::take(&path).unwrap();
        let following = Following {
            found,
            journal: Box::new(JournalFile::taken(journal)),
            frames: Box::new(SourceFrames(memory)),
            connect,
            hello: Hello::default(),
            figures: Arc::default(),
            events: source::events(),
        };
        let ending = source::follow(following).unwrap();
        assert!(!path.exists() || matches!(ending, Ending::Unknown(_)));
        ending
    };
    let (killed, dies) = (life.clone(), life.clone());
    let plan = Plan {
        source_journal: Some(Box::new(Kept::new(journal, life.clone()))),
        source_agent: Some((life, Box::new(follower))),
        again: Some(plan.again.unwrap_or_else(|| Box::new(|_| Some((pass(), pass()))))),
        ..plan
    };
    let let_go = Arc::new(AtomicBool::new(false));
    let plan = plan.hooks(move |_| {
        let hook = move |forth: bool| -> Hook {
            let (let_go, killed) = (let_go.clone(), killed.clone());
            Box::new(move |frame: &mut hosts::OnTheWay| {
                if forth && frame.kind == kind::GO {
                    let_go.store(true, Ordering::SeqCst);
                }
                let here = forth == cut.to_destination && frame.kind == cut.kind && frame.nth >= cut.nth;
                if !here || !let_go.load(Ordering::SeqCst) {
                    return Fate::Pass;
                }
                // By another thread than the agent's own, as a signal comes.
                let killed = killed.clone();
                std::thread::spawn(move || killed.kill()).join().unwrap();
                cut.fate
            })
        };
        (hook(true), hook(false))
    });
    (plan, dies)
}

/// The source's agent is killed while pages follow: they can be sent by another process, and the copy stays until they have
/// come. Whether the destination's is killed, too, is all the same.
#[test]
fn a_source_that_is_killed_has_an_heir() {
    let mut killed = 0;
    for seed in 0..12 {
        let mut dice = Dice(seed ^ 0xfeed);
        let (to_destination, kind, most) = [
            (true, kind::LATE, 10),
            (true, kind::LATE, 60),
            (false, kind::WANT, 10),
            (false, kind::STARTED, 1),
            (false, kind::PONG, 30),
        ][dice.throw(5) as usize];
        let cut = Cut {
            to_destination,
            kind,
            nth: dice.throw(most) as usize,
            fate: Fate::CutBefore,
        };
        let case = Case {
            seed,
            touches: dice.throw(600),
            ..long()
        };
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let both = dice.throw(2) == 0;
        let (plan, errors) = if both {
            let lives = [3000 + dice.throw(9000) as i64, dice.throw(3000) as i64];
            let (plan, _, errors) = with_deaths(plan, &guest, folder.path(), &lives);
            (plan, errors)
        } else {
            (plan, Arc::default())
        };
        let (plan, life) = with_dying_source(plan, &memory, folder.path(), cut);
        let outcome = migrate(plan);
        assert_eq!(*errors.lock(), [] as [String; 0], "{cut:?}");
        assert!(
            matches!(outcome.ending, Ending::Completed { status: 0 }),
            "{cut:?}, {both}: {:?}",
            outcome.ending
        );
        compare(&memory, &guest, case.pages);
        killed += usize::from(life.is_dead());
        // A dead agent cannot tell it any more.
        let left = if life.is_dead() {
            SourceXl::Suspended
        } else {
            SourceXl::Gone
        };
        assert_eq!(outcome.source_xl, left, "{cut:?}");
    }
    assert!(killed > 6, "{killed} were killed");
}

/// A source that lied is not believed; another process that sends what is right is.
#[test]
fn after_a_wrong_page_it_can_be_tried_again() {
    let case = long();
    let folder = tempfile::tempdir().unwrap();
    let (plan, memory, guest) = plan(&case);
    let cut = Cut {
        to_destination: false,
        kind: kind::ABORT,
        nth: 0,
        fate: Fate::CutAfter,
    };
    let (mut plan, life) = with_dying_source(plan, &memory, folder.path(), cut);
    let hooks = plan.hooks;
    plan.hooks = Box::new(move |controls| {
        let (mut forth, back) = hooks(controls);
        let (mut let_go, mut lied) = (false, false);
        let lies = move |frame: &mut hosts::OnTheWay| {
            let_go |= frame.kind == kind::GO;
            if let_go && frame.kind == kind::LATE && frame.nth >= 10 && !lied {
                lied = true;
                frame.body.truncate(11);
            }
            forth(frame)
        };
        (Box::new(lies), back)
    });
    let outcome = migrate(plan);
    assert!(life.is_dead(), "nobody gave up");
    assert!(
        matches!(outcome.ending, Ending::Completed { status: 0 }),
        "{:?}",
        outcome.ending
    );
    compare(&memory, &guest, case.pages);
}

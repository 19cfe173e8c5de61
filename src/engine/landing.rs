//! Late pages at the destination: taken out of the guest before it starts, fetched when somebody touches them, put where
//! they belong when they come.
//!
//! Two threads work on one state: whoever reads the connection brings pages ([`Landing::arrived`]), and the pager's own
//! thread hears Xen ([`Landing::serve`]).
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::contents::read_checked;
use super::early::EarlyTime;
use super::journal::LateJournal;
use super::link::{Link, Watch};
use super::rejoin::{Incoming, Joined};
use super::said::Said;
use super::threads::spawn;
use super::{Contents, EngineError, Frames, GuestPaging, Notices, PageRequest};
use crate::late::journal::Noted;
use crate::late::{Arrival, Asking, Pager, SaveStep, Saving};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn, ZERO_PAGE};
use crate::page_set::PageSet;
use crate::report::LateFigures;
use crate::table::PageIds;
use crate::wire::{Kind, LatePages, LateRow, MAX_WANTS, WireError, missing_bodies, want_body};
use state::State;

/// Pages that are taken out of the guest in one go.
const EVICT_PAGES: usize = 256;

/// How long the pager waits for Xen before it looks around.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// How often it is looked whether the guest is still there.
const ALIVE: Duration = Duration::from_secs(1);

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Landed {
    /// Every page is where it belongs.
    All,
    /// The guest is gone, and nobody needs them.
    GuestGone,
}

/// Where the late pages go, once there are some.
pub(super) type LateLanding = Arc<Mutex<Option<Arc<Landing>>>>;

/// The late pages of one guest.
pub(super) struct Landing {
    state: Mutex<State>,
    changed: Condvar,
    link: Link,
    /// A connection that is lost is set up again.
    rejoins: bool,
    key: ContentKey,
    contents: Option<Arc<dyn Contents>>,
    start: Instant,
}

/// What a landing is made from.
pub(super) struct Late {
    /// Late pages, ascending.
    pub pages: Vec<Pfn>,
    /// Paging is on, these pages are out already, and how long that took.
    pub on: bool,
    pub out: PageSet,
    pub early_time: EarlyTime,
    pub paging: Box<dyn GuestPaging>,
    pub frames: Frames,
    pub verify: bool,
    pub link: Link,
    pub rejoins: bool,
    pub key: ContentKey,
    /// What this host holds, for pages that are named by their content.
    pub contents: Option<Arc<dyn Contents>>,
}

/// What a landing goes on with whose process was killed.
pub(super) struct Taken {
    /// Pages that may still be missing, ascending, those of them that another domain waits for, and how many were late besides.
    pub missing: Vec<Pfn>,
    pub awaited: Vec<Pfn>,
    pub before: u64,
    pub noted: Noted,
    pub paging: Box<dyn GuestPaging>,
    pub frames: Frames,
    pub journal: Box<dyn LateJournal>,
    /// Without a connection.
    pub link: Link,
    pub key: ContentKey,
}

impl Landing {
    /// Takes the late pages out of the guest. Where Xen does not do that they have to come before the guest is started:
    /// [`Landing::wait_resident`].
    pub fn prepare(late: Late) -> Result<Arc<Landing>, EngineError> {
        let Late {
            pages,
            on,
            out,
            early_time,
            mut paging,
            mut frames,
            verify,
            link,
            rejoins,
            key,
            contents,
        } = late;
        let start = Instant::now();
        let mut resident = Vec::new();
        let mut pager = Pager::new(pages.iter().copied());
        // Xen's toolstack has emptied these, and whoever is at the other end of them has begun anew.
        let rewritten = frames
            .as_mut()
            .map_or(Ok(Vec::new()), |frames| frames.rewritten_by_xen())?;
        rewritten.iter().for_each(|pfn| pager.leave_alone(*pfn));
        for pfn in out.iter().filter(|pfn| pager.judge(*pfn) != Arrival::Late) {
            paging.load(pfn, &ZERO_PAGE)?;
        }
        let pages: Vec<Pfn> = pager.missing_pages().filter(|pfn| !out.contains(*pfn)).collect();
        match if on { Ok(()) } else { paging.enable() } {
            Ok(()) => {
                for batch in pages.chunks(EVICT_PAGES) {
                    let evicted = paging.evict(batch)?;
                    let kept = batch.iter().enumerate();
                    resident.extend(
                        kept.filter(|(at, _)| evicted.get(*at) != Some(&true))
                            .map(|(_, pfn)| *pfn),
                    );
                }
            }
            Err(error) => {
                // None is out.
                log::warn!("no page of this guest can be left behind ({error}): all come before it is started");
                resident.clone_from(&pages);
            }
        }
        if on {
            paging.secure()?;
        }
        let figures = LateFigures {
            early: out.len(),
            early_time_ms: early_time.out.as_millis() as u64,
            early_back: early_time.came_back,
            early_back_time_ms: early_time.back.as_millis() as u64,
            fetched_before: resident.len() as u64,
            evict_time_ms: start.elapsed().as_millis() as u64,
            ..LateFigures::default()
        };
        Ok(Arc::new(Landing {
            state: Mutex::new(State {
                resident,
                came: verify.then(PageIds::default),
                figures,
                ..State::new(pager, paging, frames)
            }),
            changed: Condvar::new(),
            link,
            rejoins,
            key,
            contents,
            start,
        }))
    }

    /// Goes on where a process was killed. The guest stands still until there is a connection.
    pub fn take_over(taken: Taken) -> Result<Arc<Landing>, EngineError> {
        let now = Instant::now();
        let mut state = State {
            started: Some(now),
            figures: LateFigures {
                takeovers: 1,
                ..LateFigures::default()
            },
            ended: taken.noted.landed.then_some(Landed::All),
            lost: Some(now),
            journal: Some(taken.journal),
            noted: taken.noted,
            before: taken.before,
            ..State::new(Pager::new(taken.missing), taken.paging, taken.frames)
        };
        for pfn in taken.awaited {
            // Nobody is answered: it tries again until the page is there.
            let _ = state.pager.asked(Duration::ZERO, pfn, Asking::Domain, 0);
        }
        if state.ended.is_none() && !state.paging.guest_exists()? {
            (state.gone, state.ended) = (true, Some(Landed::GuestGone));
        }
        if state.ended.is_some() {
            state.pager.abandon();
        } else {
            // The former one may have been killed right before it did so, or right after it let go.
            state.stands = state.noted.held && state.paging.is_held()?;
            if !state.stands {
                state.hold()?;
            }
            state.paging.take_over()?;
        }
        Ok(Arc::new(Landing {
            state: Mutex::new(state),
            changed: Condvar::new(),
            link: taken.link,
            rejoins: true,
            key: taken.key,
            contents: None,
            start: now,
        }))
    }

    /// From here on another process can go on, should this one be killed.
    pub fn keep(&self, mut journal: Box<dyn LateJournal>) {
        let mut state = self.state.lock();
        let missing: Vec<Pfn> = state.pager.missing_pages().collect();
        let mut late = PageSet::new(missing.last().map_or(0, |last| last.get() + 1));
        missing.into_iter().for_each(|pfn| {
            late.insert(pfn);
        });
        state.noted = Noted {
            held: state.stands,
            started: false,
            landed: state.ended.is_some(),
        };
        match journal.begin(&late, state.noted) {
            Ok(()) => state.journal = Some(journal),
            Err(error) => log::warn!(
                "it cannot be written down which pages follow the guest ({error}): should xenfold be killed, they are lost"
            ),
        }
    }

    /// xl has said that the guest runs.
    pub fn note_started(&self) {
        let mut state = self.state.lock();
        state.note(|noted| noted.started = true);
    }

    /// Nobody has to go on any more.
    pub fn forget(&self) {
        if let Some(mut journal) = self.state.lock().journal.take() {
            journal.end();
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Asks for the pages that have to be there before the guest is started. Whether there are any.
    pub fn ask_resident(&self) -> Result<bool, EngineError> {
        let mut state = self.state.lock();
        for pfn in state.resident.clone() {
            state.pager.bring(pfn);
        }
        let some = !state.resident.is_empty();
        self.ask(state)?;
        Ok(some)
    }

    /// Whether all pages are there that have to be before the guest is started. Waits for a moment.
    pub fn wait_resident(&self, patience: Duration) -> bool {
        let mut state = self.state.lock();
        let missing = |state: &State| {
            state
                .resident
                .iter()
                .any(|pfn| state.pager.judge(*pfn) == Arrival::Late)
        };
        if missing(&state) {
            // Whatever wakes it, it is looked again.
            let _ = self.changed.wait_for(&mut state, patience);
        }
        !missing(&state)
    }

    /// Starts the pager. From here on somebody may touch the pages.
    pub fn serve(self: &Arc<Landing>) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        state.started = Some(Instant::now());
        let notices = if state.pager.missing() == 0 {
            None
        } else {
            Some(state.paging.notices()?)
        };
        drop(state);
        let landing = self.clone();
        spawn("xenfold-pager", move || {
            if let Some(notices) = notices {
                landing.run(notices);
            }
            landing.finish();
        })?;
        Ok(())
    }

    fn run(&self, mut notices: Box<dyn Notices>) {
        let mut looked = Instant::now();
        loop {
            notices.wait(LOOK_AROUND);
            let state = self.state.lock();
            if state.gone || state.pager.missing() == 0 {
                return;
            }
            if let Err(error) = self.take_requests(state).and_then(|()| self.look_for_save()) {
                self.stands_still(&error);
            }
            if looked.elapsed() >= ALIVE {
                looked = Instant::now();
                if self.state.lock().guest_has_ended() {
                    return;
                }
            }
        }
    }

    fn take_requests(&self, mut state: MutexGuard<'_, State>) -> Result<(), EngineError> {
        let now = self.now();
        for PageRequest { pfn, asking, token } in state.paging.requests()? {
            if asking == Asking::Domain
                && state.pager.judge(pfn) == Arrival::Late
                && let Some(Err(error)) = state.journal.as_mut().map(|journal| journal.awaited(pfn))
            {
                log::debug!("that page {pfn} is waited for cannot be written down: {error}");
            }
            if let Some(token) = state.pager.asked(now, pfn, asking, token) {
                state.paging.answer(token)?;
            }
        }
        for token in state.pager.freed() {
            state.paging.answer(token)?;
        }
        self.ask(state)
    }

    /// Another program may be about to save the guest, which would lose what is missing: see [`Save`].
    fn look_for_save(&self) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        if state.gone || state.pager.missing() == 0 {
            return Ok(());
        }
        let saving = state.paging.saving().unwrap_or_else(|error| {
            log::debug!("it cannot be seen whether somebody saves the guest: {error}");
            Saving::No
        });
        let missing = state.pager.missing();
        match state.save.seen(self.now(), saving) {
            None => return Ok(()),
            Some(SaveStep::Hold) => {
                let when = state.pause();
                log::warn!(
                    "another program (xl save, xl migrate) suspends the guest, {missing} pages of which are still on the other \
                     host: it stands still{when} until they have come, as fast as they can, but not so long that xl gives up"
                );
            }
            Some(SaveStep::Release) => {
                log::error!(
                    "another program (xl save, xl migrate) suspends the guest, and {missing} of its pages have not come in time: \
                     what is saved will lack them. Do not use it; save or migrate the guest again when its pages are there"
                );
                state.let_run();
            }
            Some(SaveStep::Lost) => {
                state.figures.lost_to_save = missing;
                log::error!(
                    "another program (xl save, xl migrate) has suspended the guest while {missing} of its pages were still on the \
                     other host: WHAT IT SAVES LACKS THEM. Do not use it; where the guest goes on here nothing is lost, and it can \
                     be saved or migrated again when its pages are there"
                );
                state.let_run();
            }
        }
        state.pager.hurry();
        self.ask(state)
    }

    /// Sends what there is to ask for.
    fn ask(&self, mut state: MutexGuard<'_, State>) -> Result<(), EngineError> {
        loop {
            let wants = state.pager.wants(MAX_WANTS);
            if wants.is_empty() {
                return Ok(());
            }
            let body = want_body(&wants);
            let sent = MutexGuard::unlocked(&mut state, || self.link.send(Kind::Want, &[&body]));
            match sent {
                Ok(()) => {}
                // It is asked again on the next connection; whoever reads this one finds it lost, too.
                Err(error) if self.rejoins => {
                    log::debug!("pages cannot be asked for: {error}");
                    return Ok(());
                }
                Err(error) => return Err(EngineError::Wire(error.into())),
            }
        }
    }

    /// Takes the body of a Late frame. Errors: it is not what the source said that it is, nobody may send it, or Xen does not take a page.
    /// Of a guest that has ended none is needed.
    pub fn arrived(&self, body: &[u8]) -> Result<(), EngineError> {
        let frame = LatePages::parse(body)?;
        let full = frame.pages.iter().filter(|(_, row)| matches!(row, LateRow::Full(_)));
        let ids: Vec<ContentId> = full.filter_map(|(_, row)| content(row)).collect();
        // Takes its time, for which nobody who asks for a page is to wait.
        let held = self.look_up(&frame);
        let mut state = self.state.lock();
        let pages = match ids.len() {
            0 if frame.block.is_empty() => Vec::new(),
            0 => return Err(EngineError::Protocol("late pages come with bytes of no page")),
            count => state.decompressor.decompress(frame.codec, frame.block, count)?,
        };
        let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
        let mut put = Vec::new();
        let result = self.put_all(&mut state, &frame, pages, held, &mut put);
        // Also with an error: they are there.
        let marked = state.come(self.now(), &put);
        if let Err(error) = result.and(marked) {
            if !matches!(error, EngineError::Frame(_)) || !state.guest_has_ended() {
                return Err(error);
            }
            log::debug!("the guest has ended: {}", super::chain(&error));
        }
        let last = state.pager.missing() == 0;
        self.ask(state)?;
        if last || self.state.lock().started.is_none() {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// What this host holds of the contents that a frame names, in their order.
    fn look_up(&self, frame: &LatePages<'_>) -> Vec<Option<[u8; PAGE_SIZE]>> {
        let named = frame.pages.iter().filter_map(|(_, row)| match row {
            LateRow::Known(id) => Some(*id),
            _ => None,
        });
        let ids: Vec<ContentId> = named.collect();
        let Some(contents) = self.contents.as_ref().filter(|_| !ids.is_empty()) else {
            // It is asked for.
            return vec![None; ids.len()];
        };
        let (pages, right) = read_checked(contents.as_ref(), &self.key, &ids);
        let pages = pages.as_chunks::<PAGE_SIZE>().0.iter();
        pages.zip(right).map(|(page, right)| right.then_some(*page)).collect()
    }

    /// Puts the pages of a frame where they belong; `put` gets them. `held`: those that were looked up.
    fn put_all(
        &self,
        state: &mut State,
        frame: &LatePages<'_>,
        pages: &[[u8; PAGE_SIZE]],
        held: Vec<Option<[u8; PAGE_SIZE]>>,
        put: &mut Vec<Pfn>,
    ) -> Result<(), EngineError> {
        let mut full = pages.iter().zip(self.key.ids(pages));
        let mut held = held.into_iter();
        for (pfn, row) in &frame.pages {
            let page = match row {
                LateRow::Full(id) => {
                    let (page, hash) = full.next().ok_or(EngineError::WorkerLost)?;
                    if hash != *id {
                        return Err(EngineError::ContentDiffers { pfn: *pfn });
                    }
                    Some(*page)
                }
                LateRow::Zero | LateRow::Gone => Some(ZERO_PAGE),
                LateRow::Same(id, other) => state.same(&self.key, *id, *other, put),
                LateRow::Known(_) => held.next().flatten(),
            };
            match (state.pager.judge(*pfn), page) {
                (Arrival::Unknown, _) => return Err(EngineError::Protocol("a page came that is not late")),
                (Arrival::NotNeeded, _) => {}
                // A page may come twice in a frame.
                (Arrival::Late, _) if put.contains(pfn) => {}
                (Arrival::Late, Some(page)) => {
                    self.put(state, *pfn, &page, content(row))?;
                    put.push(*pfn);
                    state.figures.referred += u64::from(matches!(row, LateRow::Same(..)));
                    state.figures.known += u64::from(matches!(row, LateRow::Known(_)));
                }
                (Arrival::Late, None) => {
                    state.figures.asked_again += 1;
                    state.pager.again(*pfn);
                }
            }
        }
        Ok(())
    }

    fn put(
        &self,
        state: &mut State,
        pfn: Pfn,
        page: &[u8; PAGE_SIZE],
        id: Option<ContentId>,
    ) -> Result<(), EngineError> {
        if state.resident.binary_search(&pfn).is_ok() {
            state.paging.write(pfn, page)?;
        } else {
            state.paging.load(pfn, page)?;
        }
        if let Some(came) = &mut state.came {
            came.set(pfn, id.unwrap_or_else(|| self.key.id(page)))?;
        }
        Ok(())
    }

    /// All pages are there, or nobody needs them any more: lets go of the guest.
    fn finish(&self) {
        let mut state = self.state.lock();
        while !state.gone {
            match state.let_go(&self.key) {
                Ok(()) => break,
                Err(error) if state.guest_has_ended() => log::debug!("the guest has ended: {error}"),
                Err(error) => {
                    log::warn!("the last page has come, and the guest cannot be let go yet: {error}");
                    MutexGuard::unlocked(&mut state, || std::thread::sleep(ALIVE));
                }
            }
        }
        if state.gone {
            state.stands = false;
        }
        state.unpause();
        state.note(|noted| noted.landed = true);
        state.figures.time_ms = state.started.map_or(0, |time| time.elapsed().as_millis() as u64);
        state.ended = Some(if state.gone { Landed::GuestGone } else { Landed::All });
        drop(state);
        self.changed.notify_all();
    }

    pub fn has_ended(&self) -> bool {
        self.state.lock().ended.is_some()
    }

    /// The guest is not to be run here: nobody waits for its pages any more.
    pub fn dismantle(&self) {
        let mut state = self.state.lock();
        state.pager.abandon();
        state.gone = true;
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for the end.
    pub fn wait(&self) -> Landed {
        let mut state = self.state.lock();
        loop {
            match state.ended {
                Some(ended) => return ended,
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Pages will not come any more: the guest is held still, and that is said.
    pub fn stands_still(&self, error: &EngineError) {
        let mut state = self.state.lock();
        if state.gone || state.ended.is_some() || state.broken || state.guest_has_ended() {
            return;
        }
        state.broken = true;
        let when = state.pause();
        let kept = match error {
            EngineError::PeerAborted(_) => "",
            _ => ", and its memory there is kept",
        };
        log::error!(
            "{} pages of the guest cannot be had from the other host: {}. The guest stands still here{when}{kept}.",
            state.pager.missing(),
            super::chain(error),
        );
    }

    /// There is no connection for now: the guest is held still, since somebody who waits for a page in vain gives up.
    pub fn link_lost(&self, error: &EngineError) {
        let mut state = self.state.lock();
        if state.lost.is_none() {
            state.lost = Some(Instant::now());
            state.figures.outages += 1;
        }
        let stands = state.stands && !state.save.holds();
        if state.gone || state.ended.is_some() || stands || state.pager.missing() == 0 {
            return;
        }
        let when = state.pause();
        log::warn!(
            "{}: {} pages of the guest are still on the other host, which keeps them and connects again. Until then the guest, \
             which is this host's, stands still{when}.",
            super::chain(error),
            state.pager.missing(),
        );
    }

    /// There is a connection again: says what is missing, what of `said` was not heard, and lets the guest go on.
    pub fn connected_again(&self, joined: Joined, said: &Said) -> Result<(Incoming, Watch), EngineError> {
        let Joined {
            reader,
            watch,
            mut out,
            hangup,
            carrier,
            heard,
        } = joined;
        let mut state = self.state.lock();
        let missing = state.pager.missing();
        watch.shorten(state.patience.connected_again(missing));
        state.pager.connected_again();
        let wire = |error| EngineError::Wire(WireError::Io(error));
        for body in missing_bodies(state.pager.missing_pages()) {
            out.write(Kind::Missing, &[&body]).map_err(wire)?;
        }
        out.write(Kind::Missing, &[]).map_err(wire)?;
        let quiet = said.again(&mut out, heard).map_err(wire)?;
        self.link.go_on(out, hangup, carrier);
        drop(quiet);
        let outage = state.lost.take().map_or(Duration::ZERO, |lost| lost.elapsed());
        state.figures.outage_ms += outage.as_millis() as u64;
        // Whoever has connected tries anew, also where the one before had sent something wrong.
        state.broken = false;
        log::warn!(
            "connected again after {:.1} s: the guest goes on, {} of its pages are still on the other host",
            outage.as_secs_f64(),
            state.pager.missing()
        );
        state.let_run();
        self.ask(state)?;
        Ok((reader, watch))
    }

    /// Tells somebody once a second how it goes, until it has ended.
    pub fn tell(self: &Arc<Landing>, mut watching: Box<dyn FnMut(&LateFigures) + Send>) {
        let landing = self.clone();
        let told = spawn("xenfold-told", move || {
            while landing.state.lock().ended.is_none() {
                watching(&landing.figures());
                std::thread::sleep(ALIVE);
            }
        });
        if let Err(error) = told {
            log::warn!("the figures of the late pages cannot be told: {error}");
        }
    }

    pub fn figures(&self) -> LateFigures {
        let state = self.state.lock();
        let pager = state.pager.figures();
        LateFigures {
            fetched_before: state.figures.fetched_before,
            evict_time_ms: state.figures.evict_time_ms,
            early: state.figures.early,
            early_time_ms: state.figures.early_time_ms,
            early_back: state.figures.early_back,
            early_back_time_ms: state.figures.early_back_time_ms,
            time_ms: state.figures.time_ms,
            outages: state.figures.outages,
            outage_ms: state.figures.outage_ms,
            lost_for_ms: state.lost.map_or(0, |lost| lost.elapsed().as_millis() as u64),
            verified_pages: state.figures.verified_pages,
            different_pages: state.figures.different_pages,
            pages: pager.pages + state.before,
            takeovers: state.figures.takeovers,
            held_for_save: state.save.holds() && state.ended.is_none(),
            lost_to_save: state.figures.lost_to_save,
            referred: state.figures.referred,
            known: state.figures.known,
            asked_again: state.figures.asked_again,
            before_takeover: state.before,
            ..pager
        }
    }
}

fn content(row: &LateRow) -> Option<ContentId> {
    match row {
        LateRow::Full(id) | LateRow::Same(id, _) | LateRow::Known(id) => Some(*id),
        LateRow::Zero | LateRow::Gone => None,
    }
}

//! The hand-over with a tree that only remembers what was done to it, against
//! a destination that stops at every step in turn.

use std::{
    cell::{Cell, RefCell},
    io::IoSlice,
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use dunlin_api::wire::{Arrived, Bundle, DestinationLink};
use uuid::Uuid;

use super::*;

const LIMITS: Limits =
    Limits { silence: Duration::from_millis(400), prepare: Duration::from_secs(5) };

/// What the original does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Original {
    Runs,
    Frozen,
    /// Stopped by itself: runs on only when told.
    Parked,
    Gone,
}

struct Fake {
    is: Cell<Original>,
    records: usize,
    undumpable: bool,
}

/// Thaws by being dropped, as the engine's does.
struct FakeFrozen<'a>(&'a Cell<Original>);

impl Drop for FakeFrozen<'_> {
    fn drop(&mut self) {
        if self.0.get() == Original::Frozen {
            self.0.set(Original::Runs);
        }
    }
}

impl<'a> Tree for &'a Fake {
    type Ahead = ();
    type Frozen = FakeFrozen<'a>;
    type Parked = ();

    fn prepare(&self) -> Result<Result<(), String>, DumpError> {
        Ok(Ok(()))
    }

    fn round(&self, _: &mut (), sink: &mut dyn ImageSink) -> Result<RoundReport, DumpError> {
        assert_eq!(self.is.get(), Original::Runs);
        sink.put(5, &[IoSlice::new(&[3; 4096])]).map_err(DumpError::Sink)?;
        Ok(RoundReport { pages: 1, bytes: 4096, ..RoundReport::default() })
    }

    fn freeze(&self, ahead: Option<()>) -> Result<FakeFrozen<'a>, DumpError> {
        assert!(ahead.is_some());
        assert_eq!(self.is.replace(Original::Frozen), Original::Runs);
        Ok(FakeFrozen(&self.is))
    }

    fn dump(
        &self,
        _: &mut FakeFrozen<'a>,
        sink: &mut dyn ImageSink,
    ) -> Result<DumpReport, DumpError> {
        assert_eq!(self.is.get(), Original::Frozen);
        for _ in 0..self.records {
            sink.put(5, &[IoSlice::new(&[7; 100 << 10])]).map_err(DumpError::Sink)?;
        }
        match self.undumpable {
            true => Err(DumpError::Vanished(Pid::from_raw(1))),
            false => Ok(DumpReport::default()),
        }
    }

    fn withdraw(&self, _: &mut FakeFrozen<'a>) -> Result<(), DumpError> {
        assert_eq!(self.is.get(), Original::Frozen);
        Ok(())
    }

    fn park(&self, frozen: FakeFrozen<'a>) -> Result<(), DumpError> {
        assert_eq!(self.is.replace(Original::Parked), Original::Frozen);
        drop(frozen);
        Ok(())
    }

    fn resume(&self) {
        assert_eq!(self.is.replace(Original::Runs), Original::Parked);
    }

    fn kill(&self) {
        assert_eq!(self.is.replace(Original::Gone), Original::Parked);
    }
}

/// A daemon that lets commit, or does not, or cancels.
#[derive(Default)]
struct Daemon {
    events: RefCell<Vec<Event>>,
    no_journal: bool,
    cancel_before_commit: bool,
    canceller: Option<Canceller>,
}

impl Overseer for Daemon {
    fn tell(&mut self, event: &Event) {
        self.events.borrow_mut().push(event.clone());
    }

    fn may_commit(&mut self) -> Result<(), Problem> {
        if let Some(canceller) = self.canceller.take().filter(|_| self.cancel_before_commit) {
            assert!(canceller.cancel());
        }
        match self.no_journal {
            true => Err(Problem::new(ErrorCode::JournalFailed, "journal", "is full")),
            false => Ok(()),
        }
    }

    fn begin(&mut self, canceller: Canceller) -> Result<(), Problem> {
        self.canceller = Some(canceller);
        Ok(())
    }
}

/// Where the destination stops.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stop {
    /// Hangs up before the offer is answered.
    Offered,
    Refused,
    Prepared,
    /// Hangs up after this many records.
    Records(usize),
    /// Says that it failed after this many records.
    Fails(usize),
    Filled,
    Ready,
    /// Hangs up after it has read the commit; the flag says whether it ran.
    Committed(bool),
    /// Reads the commit, cannot run it, and says so.
    Undone,
    Never,
}

/// Whether the copy ran.
fn destination(stream: UnixStream, stop: Stop) -> Result<bool, LinkError> {
    let offer = DestinationLink::greet(&stream, LIMITS)?;
    let why = Problem::new(ErrorCode::NoRoom, "web-1", "no memory left");
    if stop == Stop::Refused {
        DestinationLink::refuse(&stream, why)?;
        return Ok(false);
    }
    let mut link = DestinationLink::resume(stream, LIMITS, &offer, image::VERSION)?;
    if stop == Stop::Offered {
        return Ok(false);
    }
    link.prepared()?;
    if stop == Stop::Prepared {
        return Ok(false);
    }
    let mut body = Vec::new();
    for record in 0.. {
        if stop == Stop::Records(record) {
            return Ok(false);
        }
        if stop == Stop::Fails(record) {
            link.fail(why);
            return Ok(false);
        }
        if link.image(&mut body)?.is_none() {
            break;
        }
    }
    if stop == Stop::Filled {
        return Ok(false);
    }
    if stop == Stop::Ready {
        // Hangs up with `Ready` on its way.
        link.announce(Sums::default())?;
        return Ok(false);
    }
    let committed = link.ready(Sums::default())?;
    match stop {
        Stop::Committed(ran) => Ok(ran),
        Stop::Undone => {
            link.fail(why);
            Ok(false)
        }
        _ => {
            link.running(committed, Arrived::default())?;
            Ok(true)
        }
    }
}

fn offer() -> Offer {
    Offer {
        migration: Uuid::new_v4(),
        token: Uuid::new_v4(),
        node: "a".into(),
        container: "web-1".parse().unwrap(),
        bundle: Bundle { source: "/b".into(), destination: None },
        annotations: std::collections::BTreeMap::new(),
        clocks: Clocks::default(),
        needs: Host::probe().needs(0, 1),
        options: MigrateOptions::default(),
    }
}

/// Moves `tree`; gives the result, what the original does then, and whether
/// the copy ran.
fn run(tree: &Fake, daemon: &mut Daemon, stop: Stop) -> (Result<Report, Problem>, Original, bool) {
    let (here, there) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let copy = scope.spawn(move || destination(there, stop).unwrap_or(false));
        let result = migrate(&tree, &offer(), here, LIMITS, daemon);
        (result, tree.is.get(), copy.join().unwrap())
    })
}

fn fake() -> Fake {
    Fake { is: Cell::new(Original::Runs), records: 20, undumpable: false }
}

#[test]
fn never_two_copies_and_never_none_wherever_the_destination_stops() {
    let mut stops = vec![
        Stop::Offered,
        Stop::Refused,
        Stop::Prepared,
        Stop::Filled,
        Stop::Ready,
        Stop::Committed(true),
        Stop::Committed(false),
        Stop::Undone,
        Stop::Never,
    ];
    stops.extend((0..=22).map(Stop::Records));
    stops.extend((0..=22).map(Stop::Fails));
    for stop in stops {
        let (result, original, ran) = run(&fake(), &mut Daemon::default(), stop);
        match original {
            Original::Runs => assert!(!ran && result.is_err(), "{stop:?}: two copies"),
            Original::Gone => assert!(ran && result.is_ok(), "{stop:?}: no copy"),
            // In doubt: nobody here may let it run.
            Original::Parked => {
                assert_eq!(result.unwrap_err().code, ErrorCode::InDoubt, "{stop:?}");
                assert!(matches!(stop, Stop::Committed(_) | Stop::Ready), "{stop:?}");
            }
            Original::Frozen => panic!("{stop:?}: frozen for ever"),
        }
    }
}

#[test]
fn the_destinations_reason_is_the_migrations() {
    for stop in [Stop::Refused, Stop::Fails(3), Stop::Undone] {
        let (result, original, _) = run(&fake(), &mut Daemon::default(), stop);
        assert_eq!(result.unwrap_err().code, ErrorCode::NoRoom, "{stop:?}");
        assert_eq!(original, Original::Runs);
    }
}

#[test]
fn no_commit_without_its_record() {
    let mut daemon = Daemon { no_journal: true, ..Daemon::default() };
    let (result, original, ran) = run(&fake(), &mut daemon, Stop::Never);
    assert_eq!(result.unwrap_err().code, ErrorCode::JournalFailed);
    assert_eq!((original, ran), (Original::Runs, false));
}

#[test]
fn a_cancel_before_commit_lets_it_run_on() {
    let mut daemon = Daemon { cancel_before_commit: true, ..Daemon::default() };
    let (result, original, ran) = run(&fake(), &mut daemon, Stop::Never);
    assert_eq!(result.unwrap_err().code, ErrorCode::Cancelled);
    assert_eq!((original, ran), (Original::Runs, false));
}

#[test]
fn what_cannot_be_dumped_runs_on() {
    let tree = Fake { undumpable: true, ..fake() };
    let (result, original, ran) = run(&tree, &mut Daemon::default(), Stop::Never);
    assert_eq!(result.unwrap_err().code, ErrorCode::DumpFailed);
    assert_eq!((original, ran), (Original::Runs, false));
}

#[test]
fn states_are_told_in_the_order_of_the_machine() {
    let mut daemon = Daemon::default();
    run(&fake(), &mut daemon, Stop::Never).0.unwrap();
    let events = daemon.events.into_inner();
    let states: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Source(state) => Some(*state),
            _ => None,
        })
        .collect();
    assert_eq!(states, [SourceState::Preparing, SourceState::Copying, SourceState::Frozen]);
    let all = [SourceState::Offered, states[0], states[1], states[2], SourceState::Committing];
    assert!(all.windows(2).all(|pair| pair[0].leads_to(pair[1])));
}

//! The conversation between two nodes, over a socket pair: whole, cut at every
//! byte, altered, and with a peer that falls silent.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic like the tests")]

use std::{
    io::{IoSlice, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use dunlin_api::{
    ErrorCode, Problem,
    rest::MigrateOptions,
    wire::{
        Arrived, Bundle, Clocks, DestinationLink, Hello, Limits, LinkError, MAGIC, Message, Needs,
        Offer, Prefix, SourceLink, Sums, Unanswered,
    },
};
use uuid::Uuid;

const LIMITS: Limits =
    Limits { silence: Duration::from_millis(400), prepare: Duration::from_secs(5) };

fn offer() -> Offer {
    Offer {
        migration: Uuid::from_u128(1),
        token: Uuid::from_u128(2),
        node: "a".into(),
        container: "web-1".parse().unwrap(),
        bundle: Bundle { source: "/srv/web-1".into(), destination: None },
        annotations: [("k".into(), "v".into())].into(),
        clocks: Clocks { monotonic_ns: 5, boottime_ns: 6 },
        needs: Needs {
            arch: "x86_64".into(),
            kernel: "6.7.0".into(),
            cpu_features: vec!["avx2".into()],
            memory: 1 << 20,
            processes: 1,
            image_version: 1,
        },
        options: MigrateOptions::default(),
    }
}

/// Small and large records, so that both ways of sending are used.
fn records() -> Vec<(u16, Vec<u8>)> {
    let mut records: Vec<_> = (0..40u8).map(|n| (7, vec![n; usize::from(n) * 10])).collect();
    records.push((8, (0..1 << 20).map(|n: u32| n.to_le_bytes()[0]).collect()));
    records.push((9, vec![1; 4 << 20]));
    records
}

/// What a destination did before it stopped.
#[derive(Debug, Default)]
struct Seen {
    records: Vec<(u16, Vec<u8>)>,
    ran: bool,
    failure: Option<LinkError>,
}

fn destination(stream: UnixStream) -> Seen {
    let mut seen = Seen::default();
    let run = || -> Result<(), LinkError> {
        let offer = DestinationLink::greet(&stream, LIMITS)?;
        let mut link = DestinationLink::resume(stream, LIMITS, &offer, 1)?;
        link.prepared()?;
        let mut body = Vec::new();
        while let Some(kind) = link.image(&mut body)? {
            seen.records.push((kind, body.clone()));
        }
        let committed = link.ready(Sums { processes: 1, ..Sums::default() })?;
        seen.ran = true;
        link.running(committed, Arrived { thaw_us: 3 })
    };
    seen.failure = run().err();
    seen
}

/// How the container stands at the source afterwards.
#[derive(Debug, PartialEq)]
enum Left {
    Runs(ErrorCode),
    InDoubt,
    Gone,
}

fn source(stream: UnixStream) -> Left {
    let run = || -> Result<_, LinkError> {
        let mut link = SourceLink::open(stream, LIMITS)?;
        let offer = offer();
        link.offer(&offer)?;
        for (kind, body) in records() {
            let (first, rest) = body.split_at(body.len() / 3);
            link.image(kind, 1, &[IoSlice::new(first), IoSlice::new(rest)])?;
        }
        link.finish()?;
        let proof = link.ready(offer.token)?;
        Ok((link, proof))
    };
    match run() {
        Err(err) => Left::Runs(err.code()),
        Ok((link, proof)) => match link.commit(&proof) {
            Ok(arrived) => {
                assert_eq!(arrived.thaw_us, 3);
                Left::Gone
            }
            Err(Unanswered::Undone(problem)) => Left::Runs(problem.code),
            Err(Unanswered::NotSent) => Left::Runs(ErrorCode::Cancelled),
            Err(Unanswered::Unknown(_)) => Left::InDoubt,
        },
    }
}

/// Carries bytes from one end to the other through `tamper`, until it says stop.
fn relay(from: &UnixStream, to: &UnixStream, mut tamper: impl FnMut(&mut [u8], u64) -> usize) {
    let (mut from_half, mut to_half) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let mut buf = vec![0; 64 << 10];
    let mut at = 0;
    while let Ok(n @ 1..) = from_half.read(&mut buf) {
        let pass = tamper(&mut buf[..n], at);
        at += n as u64;
        if to_half.write_all(&buf[..pass]).is_err() || pass < n {
            break;
        }
    }
    for end in [from, to] {
        end.shutdown(std::net::Shutdown::Both).ok();
    }
}

/// Lets the two talk through relays; `cut` bounds the bytes each way.
fn talk(there_at_most: u64, back_at_most: u64) -> (Left, Seen, u64, u64) {
    let (a, relay_a) = UnixStream::pair().unwrap();
    let (b, relay_b) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let there = scope.spawn(|| {
            let mut sum = 0;
            relay(&relay_a, &relay_b, |bytes, at| {
                sum = at + bytes.len() as u64;
                bytes.len().min(usize::try_from(there_at_most.saturating_sub(at)).unwrap())
            });
            sum
        });
        let back = scope.spawn(|| {
            let mut sum = 0;
            relay(&relay_b, &relay_a, |bytes, at| {
                sum = at + bytes.len() as u64;
                bytes.len().min(usize::try_from(back_at_most.saturating_sub(at)).unwrap())
            });
            sum
        });
        let seen = scope.spawn(|| destination(b));
        let left = source(a);
        let seen = seen.join().unwrap();
        (left, seen, there.join().unwrap(), back.join().unwrap())
    })
}

#[test]
fn what_is_sent_arrives() {
    let (left, seen, ..) = talk(u64::MAX, u64::MAX);
    assert_eq!(left, Left::Gone);
    assert!(seen.ran && seen.failure.is_none(), "{:?}", seen.failure);
    assert!(seen.records == records());
}

#[test]
fn never_two_copies_wherever_the_link_breaks() {
    let (.., there, back) = talk(u64::MAX, u64::MAX);
    // Every byte of the small frames on both ends, and some in the bulk.
    let cuts = (0..200)
        .chain((200..there - 200).step_by(usize::try_from(there / 40).unwrap()))
        .chain(there - 200..there);
    let mut in_doubt = 0;
    for cut in
        cuts.step_by(7).map(|cut| (cut, u64::MAX)).chain((0..back).map(|cut| (u64::MAX, cut)))
    {
        let (left, seen, ..) = talk(cut.0, cut.1);
        match left {
            Left::Runs(_) => assert!(!seen.ran, "two copies when cut at {cut:?}"),
            Left::Gone => assert!(seen.ran, "no copy when cut at {cut:?}"),
            Left::InDoubt => in_doubt += 1,
        }
    }
    assert!(0 < in_doubt, "the window after commit was never hit");
}

#[test]
fn an_altered_stream_is_refused() {
    let (.., there, _) = talk(u64::MAX, u64::MAX);
    for target in [30, there / 2, there - 40] {
        let (a, relay_a) = UnixStream::pair().unwrap();
        let (b, relay_b) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                relay(&relay_a, &relay_b, |bytes, at| {
                    let offset = target.wrapping_sub(at);
                    if let Some(byte) = usize::try_from(offset).ok().and_then(|n| bytes.get_mut(n))
                    {
                        *byte ^= 0x10;
                    }
                    bytes.len()
                });
            });
            scope.spawn(|| relay(&relay_b, &relay_a, |bytes, _| bytes.len()));
            let seen = scope.spawn(|| destination(b));
            let left = source(a);
            let seen = seen.join().unwrap();
            assert!(!seen.ran, "ran although byte {target} was altered");
            // In doubt where the altered byte was the commit's.
            assert_ne!(left, Left::Gone);
        });
    }
}

#[test]
fn a_silent_peer_is_noticed_in_time() {
    let (a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        let offer = DestinationLink::greet(&b, LIMITS).unwrap();
        // Says that it is prepared, and then nothing: no heartbeat, no reading.
        let prepared = Prefix::of(dunlin_api::wire::Kind::Prepared, &[]).unwrap();
        (&b).write_all(&prepared.encode()).unwrap();
        (b, offer)
    });
    let mut link = SourceLink::open(a, LIMITS).unwrap();
    link.offer(&offer()).unwrap();
    let since = Instant::now();
    let page = vec![0; 1 << 20];
    let err = loop {
        if let Err(err) = link.image(7, 1, &[IoSlice::new(&page)]) {
            break err;
        }
    };
    assert_eq!(err.code(), ErrorCode::PeerSilent, "{err}");
    assert!(since.elapsed() < LIMITS.silence * 5, "{:?}", since.elapsed());
    drop(peer.join().unwrap());
}

#[test]
fn the_destinations_reason_arrives() {
    let (a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        let offer = DestinationLink::greet(&b, LIMITS).unwrap();
        let mut link = DestinationLink::resume(b, LIMITS, &offer, 1).unwrap();
        link.prepared().unwrap();
        link.image(&mut Vec::new()).unwrap();
        link.fail(Problem::new(ErrorCode::NoRoom, "web-1", "no memory left"));
    });
    let mut link = SourceLink::open(a, LIMITS).unwrap();
    link.offer(&offer()).unwrap();
    let page = vec![0; 1 << 20];
    let err = loop {
        if let Err(err) = link.image(7, 1, &[IoSlice::new(&page)]) {
            break err;
        }
    };
    assert_eq!((err.code(), err.to_string().as_str()), (ErrorCode::NoRoom, "no memory left"));
    peer.join().unwrap();
}

#[test]
fn a_cancel_comes_through_until_commit_and_not_after() {
    let (a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || destination(b));
    let mut link = SourceLink::open(a, LIMITS).unwrap();
    link.offer(&offer()).unwrap();
    let canceller = link.canceller();
    assert!(canceller.cancel());
    let err = link.finish().and_then(|()| link.ready(offer().token)).unwrap_err();
    assert_eq!(err.code(), ErrorCode::Cancelled, "{err}");
    assert!(!peer.join().unwrap().ran);

    let (a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || destination(b));
    let mut link = SourceLink::open(a, LIMITS).unwrap();
    link.offer(&offer()).unwrap();
    let canceller = link.canceller();
    link.finish().unwrap();
    let proof = link.ready(offer().token).unwrap();
    link.commit(&proof).unwrap();
    assert!(!canceller.cancel());
    assert!(peer.join().unwrap().ran);
}

#[test]
fn a_commit_with_another_token_runs_nothing() {
    let (a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || destination(b));
    let mut link = SourceLink::open(a, LIMITS).unwrap();
    link.offer(&offer()).unwrap();
    link.finish().unwrap();
    let proof = link.ready(Uuid::from_u128(99)).unwrap();
    assert!(link.commit(&proof).is_err());
    let seen = peer.join().unwrap();
    assert_eq!(seen.failure.unwrap().code(), ErrorCode::WrongToken);
    assert!(!seen.ran);
}

#[test]
fn an_unknown_version_is_refused_by_name() {
    let (mut a, b) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || destination(b));
    let hello = Message::Hello(Hello { magic: MAGIC, versions: vec![77] }).encode().unwrap();
    let prefix = Prefix::of(dunlin_api::wire::Kind::Hello, &[&hello]).unwrap();
    a.write_all(&prefix.encode()).unwrap();
    a.write_all(&hello).unwrap();
    let failure = peer.join().unwrap().failure.unwrap();
    assert_eq!(failure.code(), ErrorCode::VersionMismatch);
    assert!(failure.to_string().contains("77"), "{failure}");
}

/// One of each message, as version 1 writes it.
fn golden() -> Vec<(&'static str, Message)> {
    let problem = Problem::new(ErrorCode::NoRoom, "web-1", "no memory left");
    vec![
        ("hello", Message::Hello(Hello { magic: MAGIC, versions: vec![1] })),
        ("hello-ack", Message::HelloAck(1)),
        ("offer", Message::Offer(Box::new(offer()))),
        ("prepared", Message::Prepared),
        ("refused", Message::Refused(problem.clone())),
        ("image-end", Message::ImageEnd(dunlin_api::wire::End { records: 2, bytes: 300 })),
        ("ready", Message::Ready(Sums { processes: 1, threads: 2, pages: 3, restore_us: 4 })),
        ("commit", Message::Commit(Uuid::from_u128(2))),
        ("running", Message::Running(Arrived { thaw_us: 5 })),
        ("cancel", Message::Cancel(problem.clone())),
        ("error", Message::Error(problem)),
        ("heartbeat", Message::Heartbeat),
        ("sync", Message::Sync),
        ("synced", Message::Synced),
    ]
}

/// The bytes of version 1 must never change. A new message is written with
/// `DUNLIN_BLESS=1`; an existing file is never overwritten.
#[test]
fn version_1_is_written_and_read_as_ever() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    for (name, message) in golden() {
        let body = message.encode().unwrap();
        let mut frame = Prefix::of(message.kind(), &[&body]).unwrap().encode().to_vec();
        frame.extend(&body);
        let path = dir.join(name);
        if std::env::var_os("DUNLIN_BLESS").is_some() && !path.exists() {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, &frame).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        assert_eq!(frame, kept, "{name} is written differently");
        let (prefix, body) = kept.split_at(dunlin_api::wire::PREFIX);
        let prefix = Prefix::decode(prefix.try_into().unwrap()).unwrap();
        prefix.check(&[body]).unwrap();
        assert_eq!(Message::decode(prefix.header.kind, body).unwrap(), message, "{name}");
    }
}

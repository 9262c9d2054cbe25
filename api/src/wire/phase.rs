//! Who may say what when.

use super::Kind;

/// Who sent a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The node that has the container.
    Source,
    /// The node that gets it.
    Destination,
}

/// How far two nodes have come. Both ends step it on every frame they send
/// or receive.
///
/// ```text
/// Start -Hello-> Greeted -HelloAck-> Agreed -Offer-> Offered -Prepared-> Copying
///   Copying -Image, Sync-> Copying -Synced-> Copying
///   Copying -ImageEnd-> Filled -Ready-> Ready -Commit-> Committed
///   Committed -Running-> Over      Refused, Cancel, Error -> Over
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    /// Connected, nothing said.
    #[default]
    Start,
    /// The source said which versions it speaks.
    Greeted,
    /// One of them is chosen.
    Agreed,
    /// The destination is making the sandbox.
    Offered,
    /// The sandbox stands; the image may come.
    Copying,
    /// The destination has the image and builds.
    Filled,
    /// The destination could run it and may not.
    Ready,
    /// The destination may run it; the source may not any more.
    Committed,
    /// Nothing more is said.
    Over,
}

/// A frame that has no place where it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {kind:?} frame from the {from:?} has no place in phase {phase:?}")]
pub struct OutOfOrder {
    /// Phase it came in.
    pub phase: Phase,
    /// Who sent it.
    pub from: Side,
    /// What it was.
    pub kind: Kind,
}

impl Phase {
    /// The phase after `from` has sent a frame of `kind`.
    pub fn step(self, from: Side, kind: Kind) -> Result<Self, OutOfOrder> {
        use Side::{Destination, Source};
        Ok(match (self, from, kind) {
            (Self::Start, Source, Kind::Hello) => Self::Greeted,
            (Self::Greeted, Destination, Kind::HelloAck) => Self::Agreed,
            (Self::Agreed, Source, Kind::Offer) => Self::Offered,
            (Self::Offered, Destination, Kind::Prepared) => Self::Copying,
            (Self::Greeted | Self::Offered, Destination, Kind::Refused) => Self::Over,
            (Self::Copying, Source, Kind::Image | Kind::Sync)
            | (Self::Copying, Destination, Kind::Synced) => Self::Copying,
            (Self::Copying, Source, Kind::ImageEnd) => Self::Filled,
            (Self::Filled, Destination, Kind::Ready) => Self::Ready,
            (Self::Ready, Source, Kind::Commit) => Self::Committed,
            (Self::Committed, Destination, Kind::Running) => Self::Over,
            (
                Self::Agreed | Self::Offered | Self::Copying | Self::Filled | Self::Ready,
                Source,
                Kind::Cancel,
            ) => Self::Over,
            (Self::Committed, Source, Kind::Error) => {
                return Err(OutOfOrder { phase: self, from, kind });
            }
            (Self::Greeted, _, Kind::Error)
            | (
                Self::Agreed
                | Self::Offered
                | Self::Copying
                | Self::Filled
                | Self::Ready
                | Self::Committed,
                _,
                Kind::Error,
            ) => Self::Over,
            (Self::Start | Self::Over, _, _) => return Err(OutOfOrder { phase: self, from, kind }),
            (phase, _, Kind::Heartbeat) => phase,
            (phase, ..) => return Err(OutOfOrder { phase, from, kind }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAY: [(Side, Kind, Phase); 10] = [
        (Side::Source, Kind::Hello, Phase::Greeted),
        (Side::Destination, Kind::HelloAck, Phase::Agreed),
        (Side::Source, Kind::Offer, Phase::Offered),
        (Side::Destination, Kind::Prepared, Phase::Copying),
        (Side::Source, Kind::Image, Phase::Copying),
        (Side::Source, Kind::ImageEnd, Phase::Filled),
        (Side::Destination, Kind::Ready, Phase::Ready),
        (Side::Source, Kind::Commit, Phase::Committed),
        (Side::Destination, Kind::Running, Phase::Over),
        (Side::Destination, Kind::Running, Phase::Over),
    ];

    #[test]
    fn the_straight_way() {
        let mut phase = Phase::Start;
        for (from, kind, next) in &WAY[..9] {
            phase = phase.step(*from, *kind).unwrap();
            assert_eq!(phase, *next);
        }
    }

    #[test]
    fn nothing_can_be_left_out_or_said_by_the_other() {
        let other = |side| match side {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        };
        let mut phase = Phase::Start;
        for (at, (from, kind, next)) in WAY[..9].iter().enumerate() {
            assert!(phase.step(other(*from), *kind).is_err(), "{kind:?} by the wrong side");
            let (later_from, later, _) = WAY[at + 1];
            if (later, later_from) != (*kind, *from) && *kind != Kind::Image && at < 8 {
                assert!(
                    phase.step(later_from, later).is_err() || phase == Phase::Copying,
                    "{later:?} before {kind:?}"
                );
            }
            phase = *next;
        }
    }

    #[test]
    fn after_commit_the_source_cannot_take_it_back() {
        assert!(Phase::Committed.step(Side::Source, Kind::Cancel).is_err());
        assert!(Phase::Committed.step(Side::Source, Kind::Error).is_err());
        assert!(Phase::Ready.step(Side::Source, Kind::Cancel).is_ok());
        assert!(Phase::Filled.step(Side::Source, Kind::Commit).is_err());
        assert!(Phase::Over.step(Side::Source, Kind::Heartbeat).is_err());
    }
}

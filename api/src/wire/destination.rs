//! The destination's end of the conversation.

use std::{net::Shutdown, os::unix::net::UnixStream};

use uuid::Uuid;

use super::{
    Arrived, Beat, End, FrameError, Kind, Limits, LinkError, Message, Offer, OutOfOrder, Phase,
    Receiver, Sender, Side, Sums, VERSIONS, choose, link::Frame,
};
use crate::{ErrorCode, Problem};

/// The destination's end, from the sandbox on: nothing may run before
/// [`DestinationLink::ready`] has given a [`Committed`].
pub struct DestinationLink {
    stream: UnixStream,
    receiver: Receiver,
    sender: Sender,
    phase: Phase,
    limits: Limits,
    token: Uuid,
    version: u16,
    came: End,
    beat: Option<Beat>,
}

/// Proof that the source gave the container up. Comes only out of its frame.
#[derive(Debug)]
pub struct Committed(());

impl DestinationLink {
    /// Answers the greeting and reads the offer, and not a byte more: the
    /// stream can then go to another process.
    pub fn greet(stream: &UnixStream, limits: Limits) -> Result<Offer, LinkError> {
        let mut phase = Phase::default();
        let mut receiver = Receiver::unbuffered(stream.try_clone()?, limits.silence)?;
        let sender = Sender::new(stream.try_clone()?);
        let Message::Hello(hello) = hear(&mut receiver, &mut phase, &mut Vec::new())? else {
            return Err(LinkError::Closed);
        };
        let Some(version) = choose(&hello.versions, VERSIONS) else {
            let (theirs, ours) = (hello.versions, VERSIONS.to_vec());
            let err = LinkError::Version { theirs, ours };
            sender.send(&Message::Refused(Problem::new(err.code(), "peer", err.to_string())))?;
            return Err(err);
        };
        phase = phase.step(Side::Destination, Kind::HelloAck)?;
        sender.send(&Message::HelloAck(version))?;
        match hear(&mut receiver, &mut phase, &mut Vec::new())? {
            Message::Offer(offer) => Ok(*offer),
            Message::Cancel(problem) | Message::Error(problem) => Err(LinkError::Peer(problem)),
            _ => Err(LinkError::Closed),
        }
    }

    /// Answers an offer with a refusal.
    pub fn refuse(stream: &UnixStream, why: Problem) -> Result<(), LinkError> {
        Sender::new(stream.try_clone()?).send(&Message::Refused(why))?;
        Ok(stream.shutdown(Shutdown::Write)?)
    }

    /// Goes on where [`DestinationLink::greet`] ended. `version` is that of
    /// the image's records.
    pub fn resume(
        stream: UnixStream,
        limits: Limits,
        offer: &Offer,
        version: u16,
    ) -> Result<Self, LinkError> {
        let receiver = Receiver::new(stream.try_clone()?, limits.silence)?;
        let sender = Sender::new(stream.try_clone()?);
        let (phase, came, token) = (Phase::Offered, End::default(), offer.token);
        Ok(Self { stream, receiver, sender, phase, limits, token, version, came, beat: None })
    }

    /// Says that the sandbox stands. From here on a thread sends heartbeats.
    pub fn prepared(&mut self) -> Result<(), LinkError> {
        self.say(&Message::Prepared)?;
        self.beat = Some(self.sender.beat(self.limits.silence)?);
        Ok(())
    }

    /// Receives the next record's body into `body` and returns its kind, or
    /// `None` when the image has ended and nothing of it is missing.
    pub fn image(&mut self, body: &mut Vec<u8>) -> Result<Option<u16>, LinkError> {
        if self.phase == Phase::Filled {
            return Ok(None);
        }
        loop {
            let frame = self.receiver.receive(body)?;
            self.phase = self.phase.step(Side::Source, frame.kind())?;
            match frame {
                Frame::Image { kind, version } if version == self.version => {
                    self.came.records += 1;
                    self.came.bytes += body.len() as u64;
                    return Ok(Some(kind));
                }
                Frame::Image { version, .. } => {
                    let (theirs, ours) = (vec![version], vec![self.version]);
                    return Err(LinkError::Version { theirs, ours });
                }
                Frame::Message(Message::ImageEnd(end)) if end == self.came => return Ok(None),
                Frame::Message(Message::ImageEnd(end)) => {
                    return Err(LinkError::CutShort { had: self.came.bytes, said: end.bytes });
                }
                Frame::Message(Message::Heartbeat) => {}
                // Whoever asks for the next record has dealt with the last.
                Frame::Message(Message::Sync) => self.say(&Message::Synced)?,
                Frame::Message(Message::Cancel(why) | Message::Error(why)) => {
                    return Err(LinkError::Peer(why));
                }
                Frame::Message(message) => {
                    return Err(FrameError::Body(message.kind()).into());
                }
            }
        }
    }

    /// Records and bytes received so far.
    #[must_use]
    pub fn came(&self) -> End {
        self.came
    }

    /// Says that all of it stands, and waits for the source to give it up.
    pub fn ready(&mut self, sums: Sums) -> Result<Committed, LinkError> {
        self.announce(sums)?;
        self.committed()
    }

    /// The second half of [`DestinationLink::ready`].
    pub fn committed(&mut self) -> Result<Committed, LinkError> {
        match hear(&mut self.receiver, &mut self.phase, &mut Vec::new())? {
            Message::Commit(token) if token == self.token => Ok(Committed(())),
            Message::Commit(_) => Err(LinkError::Peer(Problem::new(
                ErrorCode::WrongToken,
                "commit",
                "the fencing token of the commit is not that of the offer",
            ))),
            Message::Cancel(why) | Message::Error(why) => Err(LinkError::Peer(why)),
            other => {
                let (phase, from, kind) = (self.phase, Side::Source, other.kind());
                Err(OutOfOrder { phase, from, kind }.into())
            }
        }
    }

    /// The first half of [`DestinationLink::ready`]: proves nothing.
    pub fn announce(&mut self, sums: Sums) -> Result<(), LinkError> {
        self.say(&Message::Ready(sums))
    }

    /// Says that it runs here.
    pub fn running(mut self, _: Committed, arrived: Arrived) -> Result<(), LinkError> {
        self.say(&Message::Running(arrived))
    }

    /// Says that it does not and will not run here, and why.
    pub fn fail(mut self, why: Problem) {
        // A peer that cannot be told asks.
        if self.say(&Message::Error(why)).is_ok() {
            self.stream.shutdown(Shutdown::Write).ok();
        }
    }

    fn say(&mut self, message: &Message) -> Result<(), LinkError> {
        self.phase = self.phase.step(Side::Destination, message.kind())?;
        self.sender.send(message)
    }
}

/// The source's next message that is not a heartbeat.
fn hear(
    receiver: &mut Receiver,
    phase: &mut Phase,
    body: &mut Vec<u8>,
) -> Result<Message, LinkError> {
    loop {
        let frame = receiver.receive(body)?;
        *phase = phase.step(Side::Source, frame.kind())?;
        match frame {
            Frame::Message(Message::Heartbeat) => {}
            Frame::Message(message) => return Ok(message),
            Frame::Image { .. } => {
                let (phase, from, kind) = (*phase, Side::Source, Kind::Image);
                return Err(OutOfOrder { phase, from, kind }.into());
            }
        }
    }
}

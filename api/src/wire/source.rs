//! The source's end of the conversation.

use std::{
    io::IoSlice,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use super::{
    Arrived, Beat, End, Hello, Kind, Limits, LinkError, MAGIC, Message, Offer, OutOfOrder, Phase,
    Receiver, Sender, Side, Sums, VERSIONS, link::Frame,
};
use crate::Problem;

/// The source's end: everything but [`SourceLink::commit`] can be undone.
pub struct SourceLink {
    stream: UnixStream,
    sender: Sender,
    incoming: mpsc::Receiver<Result<Message, LinkError>>,
    phase: Phase,
    limits: Limits,
    sent: End,
    gate: Canceller,
    beat: Option<Beat>,
}

/// Proof that the destination holds the whole container and waits. Comes only
/// out of the destination's frame.
#[derive(Debug)]
pub struct PeerReady {
    /// What it built.
    pub sums: Sums,
    token: uuid::Uuid,
}

/// What is known when `Commit` was not answered by `Running`.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// It was cancelled before `Commit` was sent.
    #[error("the migration was cancelled")]
    NotSent,
    /// The destination says that it has undone its part.
    #[error("the destination could not run it: {0}")]
    Undone(Problem),
    /// Nothing is known: the container may run there.
    #[error("it is not known whether the destination runs it")]
    Unknown(#[source] LinkError),
}

/// Cancels a migration from another thread.
#[derive(Clone)]
pub struct Canceller(Arc<Mutex<Gate>>);

enum Gate {
    Open(UnixStream),
    Cancelled,
    Committed,
}

impl Canceller {
    /// Breaks the conversation unless `Commit` was sent; says whether it did.
    #[must_use]
    pub fn cancel(&self) -> bool {
        let mut gate = self.lock();
        match &*gate {
            Gate::Committed => return false,
            Gate::Cancelled => return true,
            Gate::Open(stream) => hang_up(stream),
        }
        *gate = Gate::Cancelled;
        true
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_cancelled(&self) -> bool {
        matches!(*self.lock(), Gate::Cancelled)
    }
}

impl SourceLink {
    /// Greets the destination and agrees on a version.
    pub fn open(stream: UnixStream, limits: Limits) -> Result<Self, LinkError> {
        let gate = Canceller(Arc::new(Mutex::new(Gate::Open(stream.try_clone()?))));
        let sender = Sender::new(stream.try_clone()?);
        let receiver = Receiver::new(stream.try_clone()?, limits.prepare)?;
        let incoming = watch(receiver, stream.try_clone()?, limits)?;
        let (phase, sent) = (Phase::default(), End::default());
        let mut link = Self { stream, sender, incoming, phase, limits, sent, gate, beat: None };
        link.say(&Message::Hello(Hello { magic: MAGIC, versions: VERSIONS.to_vec() }))?;
        link.beat = Some(link.sender.beat(limits.silence)?);
        match link.hear()? {
            Message::HelloAck(version) if VERSIONS.contains(&version) => Ok(link),
            Message::HelloAck(version) => {
                Err(LinkError::Version { theirs: vec![version], ours: VERSIONS.to_vec() })
            }
            other => Err(link.misplaced(&other)),
        }
    }

    /// What another thread needs to cancel this.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.gate.clone()
    }

    /// Whether somebody here asked for the end of it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.gate.is_cancelled()
    }

    /// Offers the container and waits until its sandbox stands there.
    pub fn offer(&mut self, offer: &Offer) -> Result<(), LinkError> {
        self.say(&Message::Offer(Box::new(offer.clone())))?;
        match self.hear()? {
            Message::Prepared => Ok(()),
            other => Err(self.misplaced(&other)),
        }
    }

    /// Sends one record of the image.
    pub fn image(
        &mut self,
        kind: u16,
        version: u16,
        parts: &[IoSlice<'_>],
    ) -> Result<(), LinkError> {
        self.phase = self.phase.step(Side::Source, Kind::Image)?;
        let bytes = match self.sender.image(kind, version, parts) {
            Ok(bytes) => bytes as u64,
            Err(err) => return Err(self.cause(err)),
        };
        self.sent.records += 1;
        self.sent.bytes += bytes;
        Ok(())
    }

    /// Records and bytes sent so far.
    #[must_use]
    pub fn sent(&self) -> End {
        self.sent
    }

    /// Waits until the destination has dealt with everything sent so far.
    pub fn sync(&mut self) -> Result<(), LinkError> {
        self.say(&Message::Sync)?;
        match self.hear()? {
            Message::Synced => Ok(()),
            other => Err(self.misplaced(&other)),
        }
    }

    /// Ends the image.
    pub fn finish(&mut self) -> Result<(), LinkError> {
        self.say(&Message::ImageEnd(self.sent))
    }

    /// Waits until the destination has built it all. `token` is that of the offer.
    pub fn ready(&mut self, token: uuid::Uuid) -> Result<PeerReady, LinkError> {
        match self.hear()? {
            Message::Ready(sums) => Ok(PeerReady { sums, token }),
            other => Err(self.misplaced(&other)),
        }
    }

    /// Hands the container over. Whoever calls this has made sure that it
    /// stays stopped here, even if the caller is killed in the next instant.
    pub fn commit(mut self, proof: &PeerReady) -> Result<Arrived, Unanswered> {
        {
            let mut gate = self.gate.lock();
            if matches!(*gate, Gate::Cancelled) {
                return Err(Unanswered::NotSent);
            }
            *gate = Gate::Committed;
        }
        self.say(&Message::Commit(proof.token)).map_err(Unanswered::Unknown)?;
        match self.hear() {
            Ok(Message::Running(arrived)) => Ok(arrived),
            Ok(other) => Err(Unanswered::Unknown(self.misplaced(&other))),
            Err(LinkError::Peer(problem)) => Err(Unanswered::Undone(problem)),
            Err(err) => Err(Unanswered::Unknown(err)),
        }
    }

    /// Tells the destination to undo its part, and why.
    pub fn cancel(mut self, why: Problem) {
        // A peer that cannot be told sees the connection end, which means the same.
        self.say(&Message::Cancel(why)).ok();
    }

    fn say(&mut self, message: &Message) -> Result<(), LinkError> {
        self.phase = self.phase.step(Side::Source, message.kind())?;
        self.sender.send(message).map_err(|err| self.cause(err))
    }

    fn hear(&mut self) -> Result<Message, LinkError> {
        let message = match self.incoming.recv() {
            Ok(Ok(message)) => message,
            Ok(Err(_)) | Err(_) if self.gate.is_cancelled() => return Err(LinkError::Cancelled),
            Ok(Err(err)) => return Err(err),
            Err(_) => return Err(LinkError::Closed),
        };
        self.phase = self.phase.step(Side::Destination, message.kind())?;
        match message {
            Message::Refused(problem) | Message::Error(problem) => Err(LinkError::Peer(problem)),
            message => Ok(message),
        }
    }

    /// Why sending failed: mostly the peer said so before it hung up.
    fn cause(&self, err: LinkError) -> LinkError {
        if self.gate.is_cancelled() {
            return LinkError::Cancelled;
        }
        match self.incoming.recv_timeout(self.limits.silence) {
            Ok(Ok(Message::Refused(problem) | Message::Error(problem))) => LinkError::Peer(problem),
            Ok(Err(first)) => first,
            Ok(Ok(_)) | Err(_) => err,
        }
    }

    fn misplaced(&self, message: &Message) -> LinkError {
        let (phase, from, kind) = (self.phase, Side::Destination, message.kind());
        OutOfOrder { phase, from, kind }.into()
    }
}

impl Drop for SourceLink {
    fn drop(&mut self) {
        hang_up(&self.stream);
    }
}

fn hang_up(stream: &UnixStream) {
    // Fails only where the connection is gone already.
    stream.shutdown(Shutdown::Both).ok();
}

/// Listens beside the dump, so that a failed or silent peer is noticed while
/// the source only sends, and cuts the connection to wake a blocked sender.
fn watch(
    mut receiver: Receiver,
    stream: UnixStream,
    limits: Limits,
) -> Result<mpsc::Receiver<Result<Message, LinkError>>, LinkError> {
    let (tell, incoming) = mpsc::channel();
    thread::Builder::new().name("listener".into()).spawn(move || {
        let mut body = Vec::new();
        loop {
            let heard = match receiver.receive(&mut body) {
                Ok(Frame::Message(Message::Heartbeat)) => continue,
                Ok(Frame::Message(message)) => Ok(message),
                Ok(Frame::Image { .. }) => {
                    let (from, kind) = (Side::Destination, Kind::Image);
                    Err(OutOfOrder { phase: Phase::Copying, from, kind }.into())
                }
                Err(err) => Err(err),
            };
            let heard = match heard {
                Ok(Message::Prepared) => receiver
                    .set_silence(limits.silence)
                    .map(|()| Message::Prepared)
                    .map_err(LinkError::Io),
                heard => heard,
            };
            let last = !matches!(
                heard,
                Ok(Message::HelloAck(_) | Message::Prepared | Message::Synced | Message::Ready(_))
            );
            let broken = last && !matches!(heard, Ok(Message::Running(_)));
            // Nobody listens any more when the source has given up.
            let heeded = tell.send(heard).is_ok();
            if broken {
                hang_up(&stream);
            }
            if last || !heeded {
                return;
            }
        }
    })?;
    Ok(incoming)
}

//! A blocking connection that carries frames, and notices a silent peer.

use std::{
    io::{self, BufReader, IoSlice, Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use super::{FrameError, Kind, Message, OutOfOrder, PREFIX, Prefix};
use crate::{ErrorCode, Problem};

/// What is collected before it is written, and read at once.
const BUFFER: usize = 256 << 10;

/// From here on a record is written from where it lies instead of collected.
const LARGE: usize = 32 << 10;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest time without a sign of life from the peer.
    pub silence: Duration,
    /// Longest time the destination may take for the sandbox, in which the
    /// source still runs.
    pub prepare: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { silence: Duration::from_secs(2), prepare: Duration::from_secs(30) }
    }
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection failed.
    #[error("the connection to the peer broke")]
    Io(#[source] io::Error),
    /// The peer went away in the middle.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing was heard for longer than [`Limits::silence`].
    #[error("the peer was silent for {} ms", .0.as_millis())]
    Silent(Duration),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What came has no place there.
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    /// The image is not what its end says.
    #[error("the image is cut short: {had} of {said} bytes came")]
    CutShort {
        /// Bytes that came.
        had: u64,
        /// Bytes the source says it sent.
        said: u64,
    },
    /// The peers share no version.
    #[error("the peer speaks protocol versions {theirs:?}, we speak {ours:?}")]
    Version {
        /// Versions of the peer.
        theirs: Vec<u16>,
        /// Versions of ours.
        ours: Vec<u16>,
    },
    /// Somebody here asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The peer refused, cancelled or failed, and said why.
    #[error("{0}")]
    Peer(Problem),
}

impl LinkError {
    /// The code that goes with it.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Io(_) | Self::Closed | Self::Frame(_) | Self::CutShort { .. } => {
                ErrorCode::StreamDamaged
            }
            Self::Silent(_) => ErrorCode::PeerSilent,
            Self::OutOfOrder(_) => ErrorCode::OutOfOrder,
            Self::Version { .. } => ErrorCode::VersionMismatch,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Peer(problem) => problem.code,
        }
    }
}

impl From<io::Error> for LinkError {
    fn from(err: io::Error) -> Self {
        match err.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(err),
        }
    }
}

/// The receiving half.
pub struct Receiver {
    stream: BufReader<UnixStream>,
    silence: Duration,
}

impl Receiver {
    /// Receives from `stream`; any connected stream socket will do.
    pub fn new(stream: UnixStream, silence: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(silence))?;
        Ok(Self { stream: BufReader::with_capacity(BUFFER, stream), silence })
    }

    /// Receives without reading a byte beyond the frame asked for, so that
    /// the stream can be handed on.
    pub fn unbuffered(stream: UnixStream, silence: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(silence))?;
        Ok(Self { stream: BufReader::with_capacity(0, stream), silence })
    }

    /// Changes how long the peer may be silent.
    pub fn set_silence(&mut self, silence: Duration) -> io::Result<()> {
        self.silence = silence;
        self.stream.get_ref().set_read_timeout(Some(silence))
    }

    /// Receives one frame. The body of an image record, without its kind and
    /// version, replaces what was in `body`.
    pub fn receive(&mut self, body: &mut Vec<u8>) -> Result<Frame, LinkError> {
        let mut raw = [0; PREFIX];
        self.fill(&mut raw)?;
        let prefix = Prefix::decode(raw)?;
        let kind = prefix.header.kind;
        let mut len = prefix.header.len as usize;
        let mut head = [0; 4];
        if kind == Kind::Image {
            len = len.checked_sub(head.len()).ok_or(FrameError::Body(kind))?;
            self.fill(&mut head)?;
        }
        // Keeps what is there instead of clearing it: the next read covers it.
        if body.len() < len {
            body.resize(len, 0);
        } else {
            body.truncate(len);
        }
        self.fill(body)?;
        if kind == Kind::Image {
            prefix.check(&[&head, body])?;
            let [k0, k1, v0, v1] = head;
            let (kind, version) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([v0, v1]));
            return Ok(Frame::Image { kind, version });
        }
        prefix.check(&[body])?;
        Ok(Frame::Message(Message::decode(kind, body)?))
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), LinkError> {
        self.stream.read_exact(buf).map_err(|err| match err.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LinkError::Silent(self.silence),
            _ => err.into(),
        })
    }
}

/// A frame as received.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// One record of the image; its body is in the caller's buffer.
    Image {
        /// The engine's number for it.
        kind: u16,
        /// Version of its body.
        version: u16,
    },
    /// Anything else.
    Message(Message),
}

impl Frame {
    /// Kind of the frame.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Image { .. } => Kind::Image,
            Self::Message(message) => message.kind(),
        }
    }
}

/// The sending half, shared with the heartbeat.
#[derive(Clone)]
pub struct Sender(Arc<Mutex<Writer>>);

struct Writer {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Sender {
    /// Sends on `stream`.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        let buffer = Vec::with_capacity(BUFFER + LARGE);
        Self(Arc::new(Mutex::new(Writer { stream, buffer })))
    }

    /// Sends a message at once.
    pub fn send(&self, message: &Message) -> Result<(), LinkError> {
        let body = message.encode()?;
        let prefix = Prefix::of(message.kind(), &[&body])?.encode();
        let mut writer = self.lock();
        writer.buffer.extend_from_slice(&prefix);
        writer.buffer.extend_from_slice(&body);
        Ok(writer.flush()?)
    }

    /// Sends one record of the image, or keeps it until more has gathered.
    pub fn image(
        &self,
        kind: u16,
        version: u16,
        parts: &[IoSlice<'_>],
    ) -> Result<usize, LinkError> {
        let ([k0, k1], [v0, v1]) = (kind.to_le_bytes(), version.to_le_bytes());
        let head = [k0, k1, v0, v1];
        let mut slices: Vec<&[u8]> = Vec::with_capacity(parts.len() + 2);
        slices.push(&head);
        slices.extend(parts.iter().map(|part| &**part));
        let prefix = Prefix::of(Kind::Image, &slices)?;
        let raw = prefix.encode();
        slices.insert(0, &raw);
        let len = prefix.header.len as usize;
        let mut writer = self.lock();
        if len < LARGE {
            slices.iter().for_each(|slice| writer.buffer.extend_from_slice(slice));
            if BUFFER <= writer.buffer.len() {
                writer.flush()?;
            }
        } else {
            writer.flush_with(&slices)?;
        }
        Ok(len - head.len())
    }

    /// Sends a heartbeat four times per `silence` until the [`Beat`] is dropped.
    pub fn beat(&self, silence: Duration) -> io::Result<Beat> {
        let (stop, stopped) = mpsc::channel::<()>();
        let sender = self.clone();
        thread::Builder::new().name("heartbeat".into()).spawn(move || {
            while stopped.recv_timeout(silence / 4) == Err(RecvTimeoutError::Timeout) {
                if sender.send(&Message::Heartbeat).is_err() {
                    return;
                }
            }
        })?;
        Ok(Beat { _stop: stop })
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Writer {
    fn flush(&mut self) -> io::Result<()> {
        let written = self.stream.write_all(&self.buffer);
        self.buffer.clear();
        written
    }

    /// Writes what was collected and `slices` behind it without a copy.
    fn flush_with(&mut self, slices: &[&[u8]]) -> io::Result<()> {
        let mut all: Vec<IoSlice<'_>> = Vec::with_capacity(slices.len() + 1);
        all.push(IoSlice::new(&self.buffer));
        all.extend(slices.iter().map(|slice| IoSlice::new(slice)));
        let mut rest = &mut all[..];
        while !rest.is_empty() {
            match self.stream.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        self.buffer.clear();
        Ok(())
    }
}

/// A running heartbeat; ends with this value.
#[must_use = "dropping it ends the heartbeat"]
pub struct Beat {
    _stop: mpsc::Sender<()>,
}

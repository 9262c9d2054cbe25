//! The twelve bytes in front of every frame's body.

/// What a frame carries. The numbers are the format: append, never renumber.
#[repr(u16)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The source's versions.
    Hello = 1,
    /// The version chosen.
    HelloAck = 2,
    /// What is to be moved.
    Offer = 3,
    /// The sandbox stands.
    Prepared = 4,
    /// The destination does not want it.
    Refused = 5,
    /// One record of the image.
    Image = 6,
    /// The image is complete.
    ImageEnd = 7,
    /// The tree stands, nothing of it ran.
    Ready = 8,
    /// It is yours: run it.
    Commit = 9,
    /// It runs.
    Running = 10,
    /// The source keeps it.
    Cancel = 11,
    /// The sender failed and is undoing its part.
    Error = 12,
    /// The sender lives.
    Heartbeat = 13,
    /// Say when you have come this far.
    Sync = 14,
    /// Everything before `Sync` is in place.
    Synced = 15,
}

impl TryFrom<u16> for Kind {
    type Error = FrameError;

    fn try_from(raw: u16) -> Result<Self, FrameError> {
        Ok(match raw {
            1 => Self::Hello,
            2 => Self::HelloAck,
            3 => Self::Offer,
            4 => Self::Prepared,
            5 => Self::Refused,
            6 => Self::Image,
            7 => Self::ImageEnd,
            8 => Self::Ready,
            9 => Self::Commit,
            10 => Self::Running,
            11 => Self::Cancel,
            12 => Self::Error,
            13 => Self::Heartbeat,
            14 => Self::Sync,
            15 => Self::Synced,
            _ => return Err(FrameError::UnknownKind(raw)),
        })
    }
}

/// Longest body accepted, checked before we allocate for it: the longest
/// image record, its kind and its version.
pub const MAX_BODY: u32 = (4 << 20) + 4;

/// Longest body of every frame that is not part of an image.
const MAX_MESSAGE: u32 = 1 << 20;

/// Bytes of header and checksum.
pub const PREFIX: usize = 12;

/// Why bytes are not a frame.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Bytes that must be zero are not.
    #[error("reserved bytes of a frame are set")]
    Reserved,
    /// No frame has this number.
    #[error("no frame is of kind {0}")]
    UnknownKind(u16),
    /// The body is longer than this kind may be.
    #[error("a {kind:?} frame of {len} bytes is too long")]
    TooLong {
        /// Kind of the frame.
        kind: Kind,
        /// Length it announced.
        len: u32,
    },
    /// The bytes were altered on the way.
    #[error("the checksum of a {0:?} frame is wrong")]
    Checksum(Kind),
    /// The body does not decode.
    #[error("the body of a {0:?} frame is damaged")]
    Body(Kind),
}

/// Kind and length of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// Bytes of the body.
    pub len: u32,
}

impl Header {
    /// Decodes the eight little-endian bytes.
    pub fn decode(raw: [u8; 8]) -> Result<Self, FrameError> {
        let [k0, k1, 0, 0, len @ ..] = raw else { return Err(FrameError::Reserved) };
        let kind = Kind::try_from(u16::from_le_bytes([k0, k1]))?;
        let len = u32::from_le_bytes(len);
        let most = if kind == Kind::Image { MAX_BODY } else { MAX_MESSAGE };
        if most < len {
            return Err(FrameError::TooLong { kind, len });
        }
        Ok(Self { kind, len })
    }

    /// The eight little-endian bytes.
    #[must_use]
    pub fn encode(self) -> [u8; 8] {
        let [k0, k1] = (self.kind as u16).to_le_bytes();
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        [k0, k1, 0, 0, l0, l1, l2, l3]
    }
}

/// A header and the checksum (CRC-32) of header and body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Kind and length.
    pub header: Header,
    crc: u32,
}

impl Prefix {
    /// Prefix of a body that consists of `parts`.
    pub fn of(kind: Kind, parts: &[&[u8]]) -> Result<Self, FrameError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let header = Header::decode(Header { kind, len }.encode())?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header.encode());
        parts.iter().for_each(|part| crc.update(part));
        Ok(Self { header, crc: crc.finalize() })
    }

    /// Decodes the twelve bytes; the checksum is judged by [`Prefix::check`].
    pub fn decode(raw: [u8; PREFIX]) -> Result<Self, FrameError> {
        let [h0, h1, h2, h3, h4, h5, h6, h7, crc @ ..] = raw;
        let header = Header::decode([h0, h1, h2, h3, h4, h5, h6, h7])?;
        Ok(Self { header, crc: u32::from_le_bytes(crc) })
    }

    /// The twelve bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PREFIX] {
        let mut raw = [0; PREFIX];
        raw[..8].copy_from_slice(&self.header.encode());
        raw[8..].copy_from_slice(&self.crc.to_le_bytes());
        raw
    }

    /// Judges a body against the checksum.
    pub fn check(self, parts: &[&[u8]]) -> Result<(), FrameError> {
        match Self::of(self.header.kind, parts)? == self {
            true => Ok(()),
            false => Err(FrameError::Checksum(self.header.kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_judged_before_the_body() {
        let image = |len| Header { kind: Kind::Image, len }.encode();
        assert!(Header::decode(image(MAX_BODY)).is_ok());
        let longer = FrameError::TooLong { kind: Kind::Image, len: MAX_BODY + 1 };
        assert_eq!(Header::decode(image(MAX_BODY + 1)), Err(longer));
        let offer = Header { kind: Kind::Offer, len: MAX_MESSAGE + 1 };
        assert!(Header::decode(offer.encode()).is_err());
        assert_eq!(Header::decode([1, 0, 1, 0, 0, 0, 0, 0]), Err(FrameError::Reserved));
        assert_eq!(Header::decode([99, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::UnknownKind(99)));
    }

    #[test]
    fn an_altered_bit_is_found() {
        let body = b"pages".to_vec();
        let prefix = Prefix::of(Kind::Image, &[&body]).unwrap();
        for bit in 0..body.len() * 8 {
            let mut altered = body.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(prefix.check(&[&altered]), Err(FrameError::Checksum(Kind::Image)));
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_back(raw in any::<[u8; PREFIX]>(), kind in 1u16..16, len in 0..MAX_MESSAGE) {
            if let Ok(prefix) = Prefix::decode(raw) {
                prop_assert_eq!(prefix.encode(), raw);
            }
            let header = Header { kind: Kind::try_from(kind).unwrap(), len };
            prop_assert_eq!(Header::decode(header.encode()), Ok(header));
        }
    }
}

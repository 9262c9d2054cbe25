//! An image in a file.
//!
//! ```text
//! file  = "DUNLIN\0\0"  format: u16  records: u16  frame*  end
//! frame = kind: u16  0: u16  len: u32  crc: u32  body
//! end   = a frame of kind 0 whose body is the number of frames before it: u64
//! ```
//!
//! All numbers are little-endian. The checksum covers the eight bytes before
//! it and the body. The end frame tells a whole image from one cut short
//! between two frames.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, IoSlice, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{ImageSink, ImageSource, MAX_BODY, VERSION};

/// Name of the image inside its directory.
pub const NAME: &str = "image.dunlin";

const MAGIC: [u8; 8] = *b"DUNLIN\0\0";
const FORMAT: u16 = 1;
const END: u16 = 0;

/// Why a file is no image of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FileError {
    /// It begins with something else.
    #[error("not an image of dunlin")]
    Magic,
    /// We do not know this way to frame records.
    #[error("format version {0} is unknown")]
    Format(u16),
    /// We do not know these records.
    #[error("record version {0} is unknown")]
    Records(u16),
    /// A frame has bits set that mean nothing yet.
    #[error("frame {0} has reserved bits set")]
    Reserved(u64),
    /// A frame says it is longer than any can be.
    #[error("frame {frame} claims {len} bytes")]
    TooLong {
        /// Counted from 0.
        frame: u64,
        /// What it claims.
        len: u32,
    },
    /// A frame was altered.
    #[error("frame {0} has a wrong checksum")]
    Checksum(u64),
    /// The file ends before the image does.
    #[error("cut short in frame {0}")]
    CutShort(u64),
    /// Frames are missing or there is more behind the end.
    #[error("the end does not fit the frames before it")]
    End,
}

impl From<FileError> for io::Error {
    fn from(err: FileError) -> Self {
        Self::new(io::ErrorKind::InvalidData, err)
    }
}

/// Writes an image into a directory; without [`FileSink::finish`] nothing stays.
#[derive(Debug)]
pub struct FileSink {
    encoder: Encoder<BufWriter<File>>,
    dir: PathBuf,
    unfinished: Unfinished,
}

impl FileSink {
    /// Begins an image in `dir`, which is made when it is not there.
    pub fn create(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let temporary = dir.join(format!(".{NAME}.{}", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let unfinished = Unfinished(Some(temporary));
        let encoder = Encoder::new(BufWriter::with_capacity(1 << 20, file))?;
        Ok(Self { encoder, dir: dir.to_owned(), unfinished })
    }

    /// Makes the image durable and gives it its name.
    pub fn finish(self) -> io::Result<()> {
        let Self { encoder, dir, mut unfinished } = self;
        let file = encoder.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        if let Some(temporary) = unfinished.0.take() {
            fs::rename(temporary, dir.join(NAME))?;
        }
        File::open(dir)?.sync_all()
    }
}

impl ImageSink for FileSink {
    fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.encoder.put(kind, parts)
    }
}

/// Removes a file that did not become an image.
#[derive(Debug)]
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(err) = fs::remove_file(&path)
        {
            tracing::warn!(%err, path = %path.display(), "cannot remove an unfinished image");
        }
    }
}

/// Reads an image from a directory.
#[derive(Debug)]
pub struct FileSource {
    decoder: Decoder<BufReader<File>>,
}

impl FileSource {
    /// Opens the image in `dir` and judges its magic and versions.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let file = File::open(dir.join(NAME))?;
        let decoder = Decoder::new(BufReader::with_capacity(1 << 20, file))?;
        Ok(Self { decoder })
    }
}

impl ImageSource for FileSource {
    fn next(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u16>> {
        self.decoder.next(body)
    }
}

#[derive(Debug)]
struct Encoder<W> {
    to: W,
    frames: u64,
}

impl<W: Write> Encoder<W> {
    fn new(mut to: W) -> io::Result<Self> {
        to.write_all(&MAGIC)?;
        to.write_all(&FORMAT.to_le_bytes())?;
        to.write_all(&VERSION.to_le_bytes())?;
        Ok(Self { to, frames: 0 })
    }

    fn put(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
        if kind == END {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "kind 0 ends an image"));
        }
        self.frame(kind, parts)?;
        self.frames += 1;
        Ok(())
    }

    fn frame(&mut self, kind: u16, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_BODY)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the body is too long"))?;
        let mut prefix = [0; 8];
        prefix[..2].copy_from_slice(&kind.to_le_bytes());
        prefix[4..].copy_from_slice(&len.to_le_bytes());
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&prefix);
        parts.iter().for_each(|part| checksum.update(part));
        self.to.write_all(&prefix)?;
        self.to.write_all(&checksum.finalize().to_le_bytes())?;
        parts.iter().try_for_each(|part| self.to.write_all(part))
    }

    fn finish(mut self) -> io::Result<W> {
        let frames = self.frames.to_le_bytes();
        self.frame(END, &[IoSlice::new(&frames)])?;
        self.to.flush()?;
        Ok(self.to)
    }
}

#[derive(Debug)]
struct Decoder<R> {
    from: R,
    frames: u64,
    ended: bool,
}

impl<R: Read> Decoder<R> {
    fn new(mut from: R) -> io::Result<Self> {
        let mut header = [0; 12];
        read_exact(&mut from, &mut header, FileError::Magic)?;
        let [magic @ .., f0, f1, r0, r1] = header;
        if magic != MAGIC {
            return Err(FileError::Magic.into());
        }
        match (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([r0, r1])) {
            (FORMAT, VERSION) => Ok(Self { from, frames: 0, ended: false }),
            (FORMAT, records) => Err(FileError::Records(records).into()),
            (format, _) => Err(FileError::Format(format).into()),
        }
    }

    fn next(&mut self, body: &mut Vec<u8>) -> io::Result<Option<u16>> {
        body.clear();
        if self.ended {
            return Ok(None);
        }
        let frame = self.frames;
        let mut header = [0; 12];
        read_exact(&mut self.from, &mut header, FileError::CutShort(frame))?;
        let [prefix @ .., c0, c1, c2, c3] = header;
        let [k0, k1, 0, 0, len @ ..] = prefix else {
            return Err(FileError::Reserved(frame).into());
        };
        let kind = u16::from_le_bytes([k0, k1]);
        let len = u32::from_le_bytes(len);
        if MAX_BODY < len {
            return Err(FileError::TooLong { frame, len }.into());
        }
        body.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        read_exact(&mut self.from, body, FileError::CutShort(frame))?;
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&prefix);
        checksum.update(body);
        if checksum.finalize() != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(FileError::Checksum(frame).into());
        }
        if kind != END {
            self.frames += 1;
            return Ok(Some(kind));
        }
        let nothing_follows = self.from.read(&mut [0])? == 0;
        if body.as_slice() != frame.to_le_bytes() || !nothing_follows {
            return Err(FileError::End.into());
        }
        body.clear();
        self.ended = true;
        Ok(None)
    }
}

/// Fills `buf`; a file that ends before is `short`.
fn read_exact(from: &mut impl Read, buf: &mut [u8], short: FileError) -> io::Result<()> {
    from.read_exact(buf).map_err(|err| match err.kind() {
        io::ErrorKind::UnexpectedEof => short.into(),
        _ => err,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    type Frames = Vec<(u16, Vec<u8>)>;

    fn encode(frames: &Frames) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new()).unwrap();
        for (kind, body) in frames {
            let (head, tail) = body.split_at(body.len() / 2);
            encoder.put(*kind, &[IoSlice::new(head), IoSlice::new(tail)]).unwrap();
        }
        encoder.finish().unwrap()
    }

    fn decode(bytes: &[u8]) -> Result<Frames, FileError> {
        let parse = || {
            let mut decoder = Decoder::new(bytes)?;
            let (mut frames, mut body) = (Vec::new(), Vec::new());
            while let Some(kind) = decoder.next(&mut body)? {
                frames.push((kind, body.clone()));
            }
            Ok(frames)
        };
        parse().map_err(|err: io::Error| err.downcast().unwrap())
    }

    fn sample() -> Vec<u8> {
        encode(&vec![(2, b"pages".to_vec()), (3, Vec::new()), (2, vec![7; 100])])
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(
            frames in prop::collection::vec((1..=u16::MAX, prop::collection::vec(any::<u8>(), 0..99)), 0..9)
        ) {
            prop_assert_eq!(decode(&encode(&frames)).unwrap(), frames);
        }

        #[test]
        fn what_decodes_encodes_back(mut bytes in Just(sample()), at in any::<prop::sample::Index>(), byte: u8) {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(frames) = decode(&bytes) {
                prop_assert_eq!(encode(&frames), bytes);
            }
        }

        #[test]
        fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(decode(&whole[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = sample();
        for at in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(decode(&bytes).is_err(), "bit {at}");
        }
    }

    #[test]
    fn a_missing_or_added_frame_is_noticed() {
        let whole = encode(&vec![(2, vec![1; 4]), (2, vec![2; 4])]);
        let mut missing = whole.clone();
        missing.drain(12..12 + 16);
        assert_eq!(decode(&missing), Err(FileError::End));
        let added = [whole.as_slice(), &[0]].concat();
        assert_eq!(decode(&added), Err(FileError::End));
    }

    #[test]
    fn other_versions_are_refused() {
        let mut bytes = sample();
        bytes[8] = 9;
        assert_eq!(decode(&bytes), Err(FileError::Format(9)));
        let mut bytes = sample();
        bytes[10..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert_eq!(decode(&bytes), Err(FileError::Records(VERSION + 1)));
    }

    #[test]
    fn a_length_is_judged_before_it_is_used() {
        let mut bytes = sample();
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(FileError::TooLong { frame: 0, len: u32::MAX }));
        let body = vec![0; MAX_BODY as usize + 1];
        let mut encoder = Encoder::new(Vec::new()).unwrap();
        assert!(encoder.put(2, &[IoSlice::new(&body)]).is_err());
    }

    #[test]
    fn only_a_finished_image_has_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = FileSink::create(dir.path()).unwrap();
        sink.put(2, &[IoSlice::new(b"page")]).unwrap();
        assert!(FileSource::open(dir.path()).is_err());
        drop(sink);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        let mut sink = FileSink::create(dir.path()).unwrap();
        sink.put(2, &[IoSlice::new(b"page")]).unwrap();
        sink.finish().unwrap();
        let mut source = FileSource::open(dir.path()).unwrap();
        let mut body = Vec::new();
        assert_eq!(source.next(&mut body).unwrap(), Some(2));
        assert_eq!(body, b"page");
        assert_eq!(source.next(&mut body).unwrap(), None);
        assert_eq!(source.next(&mut body).unwrap(), None);
        let mode = fs::metadata(dir.path().join(NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

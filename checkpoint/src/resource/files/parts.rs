//! The image of all files in records: queues make it longer than one may be.

use super::Image;
use crate::RestoreError;

/// Bytes of the image in one record.
const PART: usize = 1 << 20;
/// Longest image that is put together.
const LONGEST: usize = 1 << 30;

const MORE: u8 = 0;
const LAST: u8 = 1;

impl Image {
    /// The bodies of its records.
    pub(crate) fn parts(&self) -> Result<Vec<Vec<u8>>, postcard::Error> {
        let bytes = postcard::to_stdvec(self)?;
        let mut parts: Vec<Vec<u8>> =
            bytes.chunks(PART).map(|part| [&[MORE], part].concat()).collect();
        if let Some(last) = parts.last_mut() {
            last[0] = LAST;
        }
        Ok(parts)
    }
}

/// An image of which some records are still to come.
#[derive(Debug, Default)]
pub(crate) struct Assembly(Vec<u8>);

impl Assembly {
    /// Takes one record; gives the image after the last.
    pub(crate) fn take(&mut self, body: &[u8]) -> Result<Option<Image>, RestoreError> {
        let damaged = |what: &str| RestoreError::Image(format!("files: {what}"));
        let (mark, part) = body.split_first().ok_or_else(|| damaged("an empty record"))?;
        if self.0.len() + part.len() > LONGEST {
            return Err(damaged("too long"));
        }
        self.0.extend_from_slice(part);
        match *mark {
            MORE => Ok(None),
            LAST => postcard::from_bytes(&std::mem::take(&mut self.0))
                .map(Some)
                .map_err(|err| damaged(&err.to_string())),
            _ => Err(damaged("a record of unknown kind")),
        }
    }
}

//! Character devices without state of their own.

use std::os::{fd::OwnedFd, unix::ffi::OsStrExt};

use rustix::fs::{OFlags, major, minor};
use serde::{Deserialize, Serialize};

use super::{Failure, Making, Refusal, Source, Target, root, set_status, table::Held};

/// Major and minor number and the usual path.
const SAFE: [((u32, u32), &str); 5] = [
    ((1, 3), "/dev/null"),
    ((1, 5), "/dev/zero"),
    ((1, 7), "/dev/full"),
    ((1, 8), "/dev/random"),
    ((1, 9), "/dev/urandom"),
];

/// A device to open again.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// From the container's root.
    pub(crate) path: Vec<u8>,
    /// Major and minor number.
    pub(crate) device: (u32, u32),
}

fn number(rdev: u64) -> (u32, u32) {
    (major(rdev), minor(rdev))
}

fn usual_path(device: (u32, u32)) -> Option<&'static str> {
    SAFE.iter().find(|(safe, _)| *safe == device).map(|(_, path)| *path)
}

pub(super) fn dump(held: &Held, source: &Source<'_>) -> Result<Image, Refusal> {
    let device = number(held.stat.st_rdev);
    let Some(usual) = usual_path(device) else {
        let what = match device {
            (10, 229) => "a FUSE connection",
            (10, 200) => "a TUN/TAP device",
            (10, 232) => "the KVM device",
            (5 | 136..=143, _) => "a terminal",
            (1, 11) => "the kernel log",
            _ => "a device",
        };
        return Err(Refusal::unmovable(format!("is {what} ({})", held.link())));
    };
    // One opened outside the container is as good as the container's own.
    let path = source.root.path(held).filter(|path| source.root.leads_to(path, held));
    let path = path.map_or_else(|| usual.into(), |path| path.as_os_str().as_bytes().to_vec());
    Ok(Image { path, device })
}

pub(super) fn open(image: &Image, flags: OFlags, target: &Target<'_>) -> Result<OwnedFd, Failure> {
    let Image { path, device } = image;
    let missing = |reason: String| Failure::Missing {
        object: format!("device {}", String::from_utf8_lossy(path)),
        reason,
    };
    if usual_path(*device).is_none() {
        return Err(Failure::Damaged("a device that is not opened again"));
    }
    let found = root::resolve(target.root, path, OFlags::PATH | OFlags::NOFOLLOW)
        .map_err(|err| missing(err.to_string()))?;
    let stat = rustix::fs::fstat(&found).making("look at a device")?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || number(stat.st_rdev) != *device {
        return Err(missing(format!("is not the device {}:{} here", device.0, device.1)));
    }
    let fd = root::resolve(target.root, path, flags & OFlags::ACCMODE)
        .map_err(|err| missing(err.to_string()))?;
    set_status(fd, flags)
}

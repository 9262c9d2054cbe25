//! Memory maps: `/proc/PID/smaps`, one [`Vma`] a mapping.

use std::io;

use nix::unistd::Pid;

/// What a mapping shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VmaKind {
    /// Private anonymous memory, `[heap]` and `[stack]` among it.
    Anonymous,
    /// A file or shared memory object.
    File {
        /// Path in the container; without the ` (deleted)` the kernel adds.
        path: Vec<u8>,
        deleted: bool,
        /// Device and inode.
        id: (u64, u64),
        /// Offset of the mapping's start.
        offset: u64,
    },
    /// The kernel's `[vdso]`.
    Vdso,
    /// The kernel's data pages in front of it: `[vvar]`, `[vvar_vclock]`.
    Vvar,
    /// `[vsyscall]`: at a fixed address in every process.
    Vsyscall,
    /// Some other object of the kernel, by name.
    Special(String),
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `r`, `w`, `x`, and `s` or `p`, as the kernel prints them.
    perms: [u8; 4],
    pub(crate) kind: VmaKind,
    /// The two-letter words of `VmFlags`.
    flags: Vec<[u8; 2]>,
}

impl Vma {
    pub(crate) fn is_readable(&self) -> bool {
        self.perms[0] == b'r'
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.perms[1] == b'w'
    }

    pub(crate) fn is_executable(&self) -> bool {
        self.perms[2] == b'x'
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.perms[3] == b's'
    }

    /// Whether `VmFlags` has `word`, e.g. `b"gd"` (`proc(5)`).
    pub(crate) fn has(&self, word: &[u8; 2]) -> bool {
        self.flags.contains(word)
    }

    /// `PROT_*` bits.
    pub(crate) fn prot(&self) -> i32 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(self.is_readable(), libc::PROT_READ)
            | bit(self.is_writable(), libc::PROT_WRITE)
            | bit(self.is_executable(), libc::PROT_EXEC)
    }

    pub(crate) fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// Reads the memory map of `pid` with its flags, in order of addresses.
pub(crate) fn vmas(pid: Pid) -> io::Result<Vec<Vma>> {
    let text = super::read(&format!("{pid}/smaps"))?;
    let mut vmas: Vec<Vma> = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            if let Some(vma) = vmas.last_mut() {
                vma.flags = flags.split(|&b| b == b' ').filter_map(|w| w.try_into().ok()).collect();
            }
        } else if let Some(vma) = parse_head(line) {
            vmas.push(vma);
        }
    }
    Ok(vmas)
}

/// Reads the memory map of `pid` when `known` was read a moment ago.
///
/// Without the flags, which cost a walk over all pages, as long as every mapping
/// overlaps one that was known: flags only ever change for a whole mapping.
pub(crate) fn vmas_again(pid: Pid, known: &[Vma]) -> io::Result<Vec<Vma>> {
    let text = super::read(&format!("{pid}/maps"))?;
    let mut vmas: Vec<Vma> = text.split(|&b| b == b'\n').filter_map(parse_head).collect();
    for vma in &mut vmas {
        let i = known.partition_point(|k| k.end <= vma.start);
        match known.get(i).filter(|k| k.start < vma.end && k.perms == vma.perms) {
            Some(like) => vma.flags = like.flags.clone(),
            None => return self::vmas(pid),
        }
    }
    Ok(vmas)
}

/// Parses `start-end perms offset dev inode path`; other lines of smaps have a
/// colon behind their first word.
fn parse_head(line: &[u8]) -> Option<Vma> {
    let mut words = line.splitn(6, |&b| b == b' ');
    let (start, end) = std::str::from_utf8(words.next()?).ok()?.split_once('-')?;
    let perms: [u8; 4] = words.next()?.try_into().ok()?;
    let mut text = || std::str::from_utf8(words.next()?).ok();
    let offset = u64::from_str_radix(text()?, 16).ok()?;
    let (major, minor) = text()?.split_once(':')?;
    let dev = u64::from_str_radix(major, 16).ok()? << 20 | u64::from_str_radix(minor, 16).ok()?;
    let inode: u64 = text()?.parse().ok()?;
    let path = words.next().unwrap_or_default().trim_ascii_start();
    Some(Vma {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        perms,
        kind: kind(path, (dev, inode), offset),
        flags: Vec::new(),
    })
}

fn kind(path: &[u8], id: (u64, u64), offset: u64) -> VmaKind {
    match path {
        b"[vdso]" => VmaKind::Vdso,
        b"[vvar]" | b"[vvar_vclock]" => VmaKind::Vvar,
        b"[vsyscall]" => VmaKind::Vsyscall,
        _ if id != (0, 0) => {
            let deleted = path.ends_with(b" (deleted)");
            let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
            VmaKind::File { path: unescape(path), deleted, id, offset }
        }
        b"" | b"[heap]" | b"[stack]" => VmaKind::Anonymous,
        name if name.starts_with(b"[anon:") => VmaKind::Anonymous,
        name => VmaKind::Special(String::from_utf8_lossy(name).into_owned()),
    }
}

/// Undoes the kernel's `\012` for a newline in a path.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        let (byte, tail) = match rest {
            [b'\\', b'0', b'1', b'2', tail @ ..] => (b'\n', tail),
            _ => (*first, tail),
        };
        out.push(byte);
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_a_deleted_file_with_a_newline_in_its_name() {
        let vma = parse_head(b"7f00-8f00 rw-s 00001000 fe:01 42      /a\\012b (deleted)").unwrap();
        assert_eq!(
            vma.kind,
            VmaKind::File {
                path: b"/a\nb".to_vec(),
                deleted: true,
                id: (0xfe << 20 | 1, 42),
                offset: 0x1000
            }
        );
        assert!(vma.is_shared() && vma.is_writable() && !vma.is_executable());
    }

    #[test]
    fn other_lines_are_no_mappings() {
        assert_eq!(parse_head(b"Rss:                   4 kB"), None);
    }

    #[test]
    fn own_maps_have_flags_and_a_vdso() {
        let vmas = vmas(Pid::this()).unwrap();
        assert!(vmas.iter().any(|v| v.kind == VmaKind::Vdso && v.has(b"ex")));
        assert!(vmas.is_sorted_by_key(|v| v.start));
    }
}

//! Files without a name.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

use super::*;

const GIB: u64 = 1 << 30;

pub(super) fn ghosts() {
    let open = |name: &str| {
        let path = format!("{}/{name}", dir());
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let remove = |name: &str| fs::remove_file(format!("{}/{name}", dir())).unwrap();
    // Deleted, sparse, open twice, once only for appending.
    let mut deleted = open("deleted");
    deleted.write_all(b"begin").unwrap();
    deleted.write_all_at(b"end", 3 * GIB).unwrap();
    deleted.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    rustix::fs::fchown(&deleted, Some(rustix::fs::Uid::from_raw(7)), None).unwrap();
    put(OpenOptions::new().append(true).open(format!("{}/deleted", dir())).unwrap(), 101);
    put(deleted, 100);
    remove("deleted");
    // Replaced by another file of that name.
    let mut replaced = open("replaced");
    replaced.write_all(b"old").unwrap();
    put(replaced, 102);
    remove("replaced");
    open("replaced").write_all(b"newer").unwrap();
    // Never had a name, and may get one.
    let tmpfile =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir());
    let mut tmpfile = tmpfile.unwrap();
    tmpfile.write_all(b"unnamed").unwrap();
    put(tmpfile, 103);
    // A directory.
    let gone = format!("{}/gone", dir());
    fs::create_dir(&gone).unwrap();
    put(File::open(&gone).unwrap(), 104);
    fs::remove_dir(&gone).unwrap();
    // A sealed memfd under two descriptions, and one that cannot be sealed.
    let memfd = memfd_create("a name", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::io::write(&memfd, &[5; 100_000]).unwrap();
    put(File::open(format!("/proc/self/fd/{}", memfd.as_raw_fd())).unwrap(), 106);
    fcntl_add_seals(&memfd, SealFlags::WRITE | SealFlags::GROW).unwrap();
    put(memfd, 105);
    put(memfd_create("plain", MemfdFlags::CLOEXEC).unwrap(), 107);
}

#[test]
fn files_without_a_name_travel_with_their_content() {
    let Some(mut holder) = Holder::start("ghosts") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    restored.assert_same((100..=107).filter(|number| *number != 103));
    let file = |number| File::from(restored.fd(number).try_clone_to_owned().unwrap());
    let read = |number, len| {
        let mut buf = vec![0; len];
        let len = file(number).read_at(&mut buf, 0).unwrap();
        buf.truncate(len);
        buf
    };

    let meta = file(100).metadata().unwrap();
    assert_eq!((meta.size(), meta.mode() & 0o7777, meta.uid()), (3 * GIB + 3, 0o640, 7));
    assert!(meta.blocks() < 100, "holes stay holes");
    assert_eq!((meta.nlink(), meta.ino()), (0, file(101).metadata().unwrap().ino()));
    assert_eq!(read(100, 6), b"begin\0");
    file(101).write_all(b"!").unwrap();
    let mut end = String::new();
    rustix::fs::seek(restored.fd(100), rustix::fs::SeekFrom::Start(3 * GIB)).unwrap();
    file(100).read_to_string(&mut end).unwrap();
    assert_eq!(end, "end!");

    assert_eq!(read(102, 9), b"old");
    assert_eq!(fs::read(holder.dir.path().join("replaced")).unwrap(), b"newer");

    assert_eq!(read(103, 9), b"unnamed");
    let link = format!("/proc/self/fd/{}", restored.fd(103).as_raw_fd());
    let named = holder.dir.path().join("named");
    let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(rustix::fs::CWD, link, rustix::fs::CWD, &named, follow).unwrap();
    assert_eq!(fs::read(named).unwrap(), b"unnamed");

    let gone = file(104).metadata().unwrap();
    assert!(gone.is_dir() && gone.nlink() == 0);

    let seals = |number| fcntl_get_seals(restored.fd(number)).unwrap();
    assert_eq!(seals(105), SealFlags::WRITE | SealFlags::GROW);
    assert_eq!(seals(107), SealFlags::SEAL);
    assert_eq!(read(106, 1 << 20), vec![5; 100_000]);
    let link = fs::read_link(format!("/proc/self/fd/{}", restored.fd(105).as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("/memfd:a name (deleted)"));
}

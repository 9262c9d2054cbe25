//! Epoll registrations.

use rustix::event::{
    EventfdFlags,
    epoll::{self, CreateFlags, EventFlags},
    eventfd,
};

use super::*;

pub(super) fn epolls() {
    let epoll = epoll::create(CreateFlags::empty()).unwrap();
    let ready = eventfd(1, EventfdFlags::empty()).unwrap();
    put(ready, 101);
    let add = |epoll: &OwnedFd, number: RawFd, data, flags: EventFlags| {
        crate::sys::epoll::add(epoll.as_fd(), number, flags.bits(), data).unwrap();
    };
    add(&epoll, 101, 0xfeed_0001, EventFlags::IN | EventFlags::ET);
    // Registered under a number that means another file now.
    put(eventfd(2, EventfdFlags::empty()).unwrap(), 102);
    add(&epoll, 102, 0xfeed_0002, EventFlags::IN);
    unistd::dup2(102, 103).unwrap();
    put(eventfd(0, EventfdFlags::empty()).unwrap(), 102);
    add(&epoll, 102, 0xfeed_0003, EventFlags::IN | EventFlags::ONESHOT);
    // Registered under a number that is closed now.
    unistd::dup2(103, 104).unwrap();
    add(&epoll, 104, 0xfeed_0004, EventFlags::IN);
    unistd::close(104).unwrap();
    // A signalfd, and an epoll inside an epoll.
    put(crate::sys::signalfd::create(1 << 9).unwrap(), 105);
    add(&epoll, 105, 0xfeed_0005, EventFlags::IN);
    put(epoll, 100);
    let outer = epoll::create(CreateFlags::empty()).unwrap();
    add(&outer, 100, 0xfeed_0006, EventFlags::IN);
    put(outer, 106);
}

fn registered(info: &FdInfo) -> Vec<String> {
    let mut lines: Vec<_> = info
        .rest
        .lines()
        .map(|line| line.split("pos:").next().unwrap().trim().to_owned())
        .collect();
    lines.sort();
    lines
}

#[test]
fn epolls_watch_what_they_watched() {
    let Some(mut holder) = Holder::start("epoll") else { return };
    assert_eq!(holder.inspect(&Options::default()), []);
    let restored = holder.migrate();
    // The task's own part, done here because the test has the fds.
    let items = restored.opened.epoll_items(restored.pid);
    let [item] = items[..] else { panic!("{items:?}") };
    assert_eq!((item.epfd, item.tfd, item.data), (100, 105, 0xfeed_0005));

    let own: Vec<_> = registered(&restored.infos[&100])
        .into_iter()
        .filter(|line| !line.contains("feed0005"))
        .collect();
    assert_eq!(own.len(), 4);
    assert_eq!(registered(&restored.info(100)), own);
    assert_eq!(registered(&restored.info(106)), registered(&restored.infos[&106]));

    let mut events = Vec::with_capacity(9);
    let soon = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(restored.fd(100), rustix::buffer::spare_capacity(&mut events), Some(&soon))
        .unwrap();
    let mut data: Vec<_> = events.iter().map(|event| event.data.u64()).collect();
    data.sort_unstable();
    assert_eq!(data, [0xfeed_0001, 0xfeed_0002, 0xfeed_0004]);
}

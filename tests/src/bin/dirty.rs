//! The workload of the freeze benches.
//!
//! `dirty PROCESSES PAGES MIB`: the first process fills `MIB` MiB and answers
//! UDP datagrams on port 7; each of all `PROCESSES` writes to the same `PAGES`
//! pages of its own once in a millisecond.

use std::{net::UdpSocket, process::Command, thread, time::Duration};

use anyhow::{Context, Result};

/// Where the first process answers.
const PORT: u16 = 7;

const PAGE: usize = 4096;

fn main() -> Result<()> {
    let args: Vec<usize> =
        std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let [processes, pages, mib] = args[..] else {
        anyhow::bail!("usage: dirty PROCESSES PAGES MIB");
    };
    let own = std::env::current_exe().context("the program has no path")?;
    let children = (1..processes)
        .map(|_| Command::new(&own).args(["0".to_owned(), pages.to_string(), "0".into()]).spawn())
        .collect::<Result<Vec<_>, _>>()?;
    let memory: Vec<u8> = (0..mib << 20).map(|at| (at / 61).to_le_bytes()[0]).collect();
    if processes != 0 {
        let socket = UdpSocket::bind(("0.0.0.0", PORT))?;
        thread::spawn(move || {
            let mut word = [0; 8];
            while let Ok((len, from)) = socket.recv_from(&mut word) {
                // A client that has gone is none of our affair.
                socket.send_to(&word[..len], from).ok();
            }
        });
    }
    let mut written = vec![0_u8; pages * PAGE];
    loop {
        for page in written.chunks_mut(PAGE) {
            page[0] = page[0].wrapping_add(1);
        }
        std::hint::black_box((&written, &memory, &children));
        thread::sleep(Duration::from_millis(1));
    }
}

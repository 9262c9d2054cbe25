//! Counts, and writes the name of its host and each number into `/shared/log`.
//!
//! One process that starts no other: what becomes of it becomes of all of it.

use std::{
    fs::{self, File},
    io::{self, Write},
    thread,
    time::Duration,
};

fn main() -> io::Result<()> {
    let mut log = File::options().create(true).append(true).open("/shared/log")?;
    for number in 1_u64.. {
        let host = fs::read_to_string("/where")?;
        // One write, so that a line is whole or not there.
        log.write_all(format!("{} {number}\n", host.trim()).as_bytes())?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

//! What the machine itself can do: nothing of ours can be faster.

use std::{
    hint::black_box,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use anyhow::{Context, Result};
use dunlin_tests::hosts::Hosts;

use super::{Bench, Sample, milliseconds};

const MIB: usize = 1 << 20;

/// Bytes copied at once by either.
const CHUNK: usize = 256 << 10;

pub(super) fn benches() -> Vec<Box<dyn Bench>> {
    vec![Box::new(Memcpy), Box::new(Tcp)]
}

/// Copies 1 GiB of memory into memory that is there already.
struct Memcpy;

impl Bench for Memcpy {
    fn name(&self) -> String {
        "memcpy-1024".to_owned()
    }

    fn ways(&self) -> Vec<&'static str> {
        vec![""]
    }

    fn measure(&mut self, _way: usize) -> Result<Vec<Sample>> {
        let from = vec![1_u8; 1024 * MIB];
        let mut to = vec![2_u8; 1024 * MIB];
        let start = Instant::now();
        to.copy_from_slice(black_box(&from));
        let time = start.elapsed();
        black_box(&to);
        Ok(vec![milliseconds("time", time)])
    }
}

/// Sends 1 GiB from one host to the other over one connection.
struct Tcp;

impl Bench for Tcp {
    fn name(&self) -> String {
        "tcp-1024".to_owned()
    }

    fn ways(&self) -> Vec<&'static str> {
        vec![""]
    }

    fn measure(&mut self, _way: usize) -> Result<Vec<Sample>> {
        let hosts = Hosts::new(&["a", "b"])?;
        let address = (hosts["b"].address(), 4711);
        let listener = hosts["b"].with(|| TcpListener::bind(address))??;
        let receiver = std::thread::spawn(move || -> Result<usize> {
            let mut stream = listener.accept()?.0;
            let mut buffer = vec![0; CHUNK];
            let mut total = 0;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(total),
                    n => total += n,
                }
            }
        });
        let mut stream = hosts["a"].with(|| TcpStream::connect(address))??;
        let chunk = vec![1; CHUNK];
        let start = Instant::now();
        for _ in 0..1024 * MIB / CHUNK {
            stream.write_all(&chunk)?;
        }
        drop(stream);
        let total = receiver.join().ok().context("the receiver panicked")??;
        let time = start.elapsed();
        anyhow::ensure!(total == 1024 * MIB, "{total} bytes arrived");
        Ok(vec![milliseconds("time", time)])
    }
}

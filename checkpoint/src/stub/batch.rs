//! A batch of syscalls, composed here and executed in the target.

use super::{CHECK, END, INDIRECT};

/// One argument of a call.
#[derive(Clone, Copy)]
pub(crate) enum Arg {
    /// A number, or an address in the target.
    Value(u64),
    /// The address of a buffer of this batch.
    Buf(Buf),
    /// What an earlier call of this batch returned; not for the last argument.
    Ret(Call),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        #[expect(clippy::cast_sign_loss, reason = "sign extension is what the kernel expects")]
        Self::Value(i64::from(value) as u64)
    }
}

impl From<Buf> for Arg {
    fn from(buf: Buf) -> Self {
        Self::Buf(buf)
    }
}

impl From<Call> for Arg {
    fn from(call: Call) -> Self {
        Self::Ret(call)
    }
}

/// A buffer that travels with the batch, and back after it ran.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buf {
    offset: usize,
    len: usize,
}

impl Buf {
    /// The part of the buffer behind its first `skip` bytes.
    pub(crate) fn skip(self, skip: usize) -> Self {
        Self { offset: self.offset + skip, len: self.len - skip }
    }
}

/// A call in a batch, to look up its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call(usize);

struct Item {
    nr: u64,
    args: [Arg; 6],
    check: bool,
    /// Where the low half of the result goes besides.
    store: Option<Arg>,
}

/// Bytes of one item: number, six arguments, result, flags, store address.
const ITEM: usize = 80;
const RESULT: usize = 56;

/// A sequence of syscalls with their buffers.
#[derive(Default)]
pub(crate) struct Batch {
    items: Vec<Item>,
    data: Vec<u8>,
    /// Places in the data that hold the address of another place.
    addresses: Vec<(Buf, Buf)>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a call whose failure ends the batch.
    pub(crate) fn call<const N: usize>(&mut self, nr: i64, args: [Arg; N]) -> Call {
        self.push(nr, args, true)
    }

    /// Adds a call that may fail.
    pub(crate) fn try_call<const N: usize>(&mut self, nr: i64, args: [Arg; N]) -> Call {
        self.push(nr, args, false)
    }

    fn push<const N: usize>(&mut self, nr: i64, args: [Arg; N], check: bool) -> Call {
        let mut six = [Arg::Value(0); 6];
        six[..N].copy_from_slice(&args);
        let nr = u64::try_from(nr).expect("syscall numbers are positive");
        self.items.push(Item { nr, args: six, check, store: None });
        Call(self.items.len() - 1)
    }

    /// Writes the low 32 bits of `call`'s result to `to` too, a buffer or an
    /// address.
    pub(crate) fn store(&mut self, call: Call, to: impl Into<Arg>) {
        self.items[call.0].store = Some(to.into());
    }

    /// Adds a buffer holding `bytes`, aligned to 16.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Buf {
        let buf = self.space(bytes.len());
        self.data[buf.offset..][..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Adds a NUL-terminated string.
    pub(crate) fn string(&mut self, text: &[u8]) -> Buf {
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Adds `len` zero bytes.
    pub(crate) fn space(&mut self, len: usize) -> Buf {
        let offset = self.data.len();
        self.data.resize(offset + len.next_multiple_of(16), 0);
        Buf { offset, len }
    }

    /// Fills the first 8 bytes of `at` with a number.
    pub(crate) fn number(&mut self, at: Buf, number: u64) {
        self.data[at.offset..][..8].copy_from_slice(&number.to_le_bytes());
    }

    /// Fills the first 8 bytes of `at` with the address of `to`.
    pub(crate) fn address(&mut self, at: Buf, to: Buf) {
        self.addresses.push((at, to));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes it takes in the target.
    pub(crate) fn size(&self) -> usize {
        self.items_size() + self.data.len()
    }

    fn items_size(&self) -> usize {
        self.items.len() * ITEM + 16
    }

    /// Lays the batch out for the address `base` in the target.
    pub(super) fn encode(&self, base: u64) -> Vec<u8> {
        let data = base + self.items_size() as u64;
        let at = |buf: Buf| data + buf.offset as u64;
        let mut out = Vec::with_capacity(self.size());
        for item in &self.items {
            let mut flags = if item.check { CHECK } else { 0 };
            let mut word = |value: u64| out.extend_from_slice(&value.to_le_bytes());
            word(item.nr);
            for (i, arg) in item.args.iter().enumerate() {
                word(match *arg {
                    Arg::Value(value) => value,
                    Arg::Buf(buf) => at(buf),
                    Arg::Ret(Call(call)) => {
                        assert!(i < 5, "the stub links the first five arguments");
                        flags |= INDIRECT << i;
                        base + (call * ITEM + RESULT) as u64
                    }
                });
            }
            word(NOT_RUN.cast_unsigned());
            word(flags);
            word(match item.store {
                Some(Arg::Value(addr)) => addr,
                Some(Arg::Buf(buf)) => at(buf),
                Some(Arg::Ret(_)) | None => 0,
            });
        }
        out.extend_from_slice(&END.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        let start = out.len();
        out.extend_from_slice(&self.data);
        for &(place, to) in &self.addresses {
            out[start + place.offset..][..8].copy_from_slice(&at(to).to_le_bytes());
        }
        out
    }

    /// The result of `call` in a batch read back, `None` when it did not run.
    pub(super) fn result(memory: &[u8], call: Call) -> Option<i64> {
        let at = call.0 * ITEM + RESULT;
        let raw = memory[at..at + 8].try_into().expect("eight bytes");
        Some(i64::from_le_bytes(raw)).filter(|&ret| ret != NOT_RUN)
    }

    /// The content of `buf` in a batch read back.
    pub(super) fn buffer<'m>(&self, memory: &'m [u8], buf: Buf) -> &'m [u8] {
        &memory[self.items_size() + buf.offset..][..buf.len]
    }

    /// The first checked call that failed: its number, its place and its errno.
    pub(super) fn failure(&self, memory: &[u8]) -> Option<(u64, Call, i32)> {
        self.items.iter().enumerate().filter(|(_, item)| item.check).find_map(|(i, item)| {
            match Self::result(memory, Call(i)) {
                Some(ret @ -4095..=-1) => {
                    Some((item.nr, Call(i), i32::try_from(-ret).expect("an errno")))
                }
                Some(_) => None,
                None => Some((item.nr, Call(i), libc::ECANCELED)),
            }
        })
    }
}

/// Result of a call that the batch did not reach; no syscall returns it.
const NOT_RUN: i64 = i64::MIN;

/// An argument list: numbers, buffers and earlier results mixed.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        [$($crate::stub::Arg::from($arg)),*]
    };
}
pub(crate) use args;

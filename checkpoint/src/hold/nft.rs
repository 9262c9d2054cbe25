//! Transactions of nf_tables, as bytes (`nfnetlink`): tables, base chains that
//! drop, and rules that let one device pass.

/// `AF_INET` and `AF_INET6` together.
pub(super) const INET: u8 = 1;
/// The neighbour protocol of IPv4.
pub(super) const ARP: u8 = 3;

/// The table goes when the socket that made it is closed.
pub(super) const OWNED: u32 = 2;

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
/// Deletes it if it is there (Linux 6.3).
const DESTROY_TABLE: u16 = SUBSYSTEM << 8 | 26;

const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// Before connection tracking sees a packet, even before fragments are joined.
const PRIORITY: i32 = -450;
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;

/// Where a chain hooks in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hook {
    pub(super) name: &'static str,
    pub(super) number: u32,
    /// The key that names the device a packet comes from or goes to.
    pub(super) device: u32,
}

/// One transaction: all of it happens or nothing.
pub(super) struct Batch(Vec<u8>);

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self(Vec::with_capacity(1024));
        batch.boundary(BATCH_BEGIN);
        batch
    }

    /// Makes a table, which must not be there.
    pub(super) fn table(&mut self, family: u8, name: &str, flags: u32) {
        self.message(NEW_TABLE, CREATE | EXCLUSIVE, family, |body| {
            text(body, 1, name);
            word(body, 2, flags);
        });
    }

    /// Deletes a table with all that is in it, if it is there.
    pub(super) fn destroy(&mut self, family: u8, name: &str) {
        self.message(DESTROY_TABLE, 0, family, |body| text(body, 1, name));
    }

    /// Makes a chain that drops every packet that comes by.
    pub(super) fn chain(&mut self, family: u8, table: &str, hook: Hook) {
        self.message(NEW_CHAIN, CREATE, family, |body| {
            text(body, 1, table);
            text(body, 3, hook.name);
            nest(body, 4, |body| {
                word(body, 1, hook.number);
                word(body, 2, PRIORITY.cast_unsigned());
            });
            word(body, 5, DROP);
            text(body, 7, "filter");
        });
    }

    /// Lets what comes from or goes to the device `index` pass.
    pub(super) fn except(&mut self, family: u8, table: &str, hook: Hook, index: u32) {
        self.message(NEW_RULE, CREATE | APPEND, family, |body| {
            text(body, 1, table);
            text(body, 2, hook.name);
            nest(body, 4, |body| {
                expression(body, "meta", |body| {
                    word(body, 1, REGISTER);
                    word(body, 2, hook.device);
                });
                expression(body, "cmp", |body| {
                    word(body, 1, REGISTER);
                    word(body, 2, 0); // equal
                    nest(body, 3, |body| attribute(body, 1, &index.to_ne_bytes()));
                });
                expression(body, "immediate", |body| {
                    word(body, 1, VERDICT_REGISTER);
                    nest(body, 2, |body| nest(body, 2, |body| word(body, 1, ACCEPT)));
                });
            });
        });
    }

    /// The bytes to send.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.boundary(BATCH_END);
        self.0
    }

    fn boundary(&mut self, kind: u16) {
        let start = self.header(kind, REQUEST, 0, SUBSYSTEM);
        self.close(start);
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.header(kind, REQUEST | ACK | flags, family, 0);
        fill(&mut self.0);
        self.close(start);
    }

    fn header(&mut self, kind: u16, flags: u16, family: u8, resource: u16) -> usize {
        let start = self.0.len();
        self.0.extend([0; 4]); // length
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend([0; 8]); // sequence number, port
        self.0.extend([family, 0]);
        self.0.extend(resource.to_be_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        let len = u32::try_from(self.0.len() - start).unwrap_or(u32::MAX);
        self.0[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// The error codes in what the kernel answered; 0 is an acknowledgement.
pub(super) fn answers(mut bytes: &[u8]) -> Vec<i32> {
    const ERROR: u16 = 2;
    let mut codes = Vec::new();
    while let (Some(len), Some(kind)) = (
        bytes.first_chunk().map(|len| u32::from_ne_bytes(*len) as usize),
        bytes.get(4..6).and_then(|kind| Some(u16::from_ne_bytes(*kind.first_chunk()?))),
    ) {
        if let Some(code) = bytes.get(16..20).and_then(<[u8]>::first_chunk)
            && kind == ERROR
        {
            codes.push(i32::from_ne_bytes(*code));
        }
        bytes = bytes.get(len.max(16).next_multiple_of(4)..).unwrap_or_default();
    }
    codes
}

fn expression(body: &mut Vec<u8>, name: &str, data: impl FnOnce(&mut Vec<u8>)) {
    nest(body, 1, |body| {
        text(body, 1, name);
        nest(body, 2, data);
    });
}

fn nest(body: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = body.len();
    body.extend([0; 4]);
    fill(body);
    let len = u16::try_from(body.len() - start).unwrap_or(u16::MAX);
    body[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    body[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
}

fn text(body: &mut Vec<u8>, kind: u16, text: &str) {
    attribute(body, kind, &[text.as_bytes(), &[0]].concat());
}

fn word(body: &mut Vec<u8>, kind: u16, word: u32) {
    attribute(body, kind, &word.to_be_bytes());
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(len.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

//! The bytes of a connection between two ranks <-> frames.
//!
//! A connection begins with a proof on both sides that they know the run's token, which is never sent: each sends
//! random bytes, and the digest of the token with the bytes of both. Frames follow: a kind, a number and a body.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::fault::{Fault, Kind};

const MAGIC: &[u8; 16] = b"hone ranks, v1\r\n";
const NONCE_BYTES: usize = 32;
/// LIMIT: a body holds at most a piece of a model, or the gradient of an adapter.
const BODY_BYTES_MAX: u64 = 64 << 30;
/// LIMIT: a body of a rank that is not known yet.
pub const GREETING_BYTES_MAX: u64 = 64 << 10;
/// Bytes of a body for which memory is reserved before they arrive.
const ROOM_BYTES: u64 = 1 << 20;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// The caller's name; the first frame of a connection.
    Hello = 1,
    /// All ranks are there.
    Welcome = 2,
    /// The sender is alive.
    Beat = 3,
    /// A rank's part in a call.
    Call = 4,
    /// The result of a call.
    Answer = 5,
    /// The sender failed, with the reason.
    Failed = 6,
    /// All ranks end with this fault.
    End = 7,
    /// The run succeeded and all ranks end.
    Done = 8,
    /// A process that was started by the sender ended, with its number and the reason.
    Ended = 9,
    /// The sender made progress while others may wait for it.
    Progress = 10,
}

impl What {
    const ALL: [What; 10] = [
        What::Hello,
        What::Welcome,
        What::Beat,
        What::Call,
        What::Answer,
        What::Failed,
        What::End,
        What::Done,
        What::Ended,
        What::Progress,
    ];
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// The frame's kind.
    pub what: What,
    /// The number of the call, or of a rank; else 0.
    pub number: u64,
    /// The frame's content.
    pub body: Vec<u8>,
}

impl Frame {
    /// Returns a frame without content.
    pub fn bare(what: What) -> Frame {
        Frame { what, number: 0, body: Vec::new() }
    }

    /// Returns a frame with a fault.
    pub fn of(what: What, number: u64, fault: &Fault) -> Frame {
        let said =
            Said { code: fault.kind.exit_code(), message: fault.message.clone(), help: fault.help.clone() };
        Frame { what, number, body: serde_json::to_vec(&said).expect("texts and a number") }
    }

    /// Returns the fault in the frame.
    pub fn fault(&self) -> Fault {
        let unread = || Fault::internal("a rank failed with a reason that cannot be read");
        serde_json::from_slice::<Said>(&self.body).map_or_else(|_| unread(), |said| said.fault())
    }

    /// Writes the frame.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        write(to, self.what, self.number, &self.body)
    }

    /// Reads a frame with at most so many bytes of content.
    pub fn read(from: &mut impl Read, bytes_max: u64) -> io::Result<Frame> {
        let mut head = [0; 17];
        from.read_exact(&mut head)?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let what = What::ALL.into_iter().find(|what| *what as u8 == head[0]);
        let what = what.ok_or_else(|| io::Error::other(format!("a frame of unknown kind {}", head[0])))?;
        let bytes = number(9);
        if bytes > bytes_max {
            return Err(io::Error::other(format!("a frame of {bytes} bytes")));
        }
        let mut body = Vec::with_capacity(bytes.min(ROOM_BYTES) as usize);
        from.take(bytes).read_to_end(&mut body)?;
        match body.len() as u64 == bytes {
            true => Ok(Frame { what, number: number(1), body }),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Reads a frame of a rank that is known.
    pub fn read_known(from: &mut impl Read) -> io::Result<Frame> {
        Frame::read(from, BODY_BYTES_MAX)
    }
}

/// Writes a frame without a copy of its content.
pub fn write(to: &mut impl Write, what: What, number: u64, body: &[u8]) -> io::Result<()> {
    let mut head = [0; 17];
    head[0] = what as u8;
    head[1..9].copy_from_slice(&number.to_le_bytes());
    head[9..].copy_from_slice(&(body.len() as u64).to_le_bytes());
    to.write_all(&head)?;
    to.write_all(body)
}

/// A fault as it is sent.
#[derive(Serialize, Deserialize)]
struct Said {
    code: u8,
    message: String,
    help: Option<String>,
}

impl Said {
    fn fault(self) -> Fault {
        let kind = kind_of(self.code.into()).unwrap_or(Kind::Internal);
        Fault { kind, message: self.message, help: self.help }
    }
}

/// Returns the kind of fault that an exit code means; `None` if hone never ends with it.
pub fn kind_of(code: i32) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| i32::from(kind.exit_code()) == code)
}

/// Proves to the other side that this one knows the token, and checks the same of the other.
pub fn prove(stream: &mut (impl Read + Write), token: &str, calls: bool) -> io::Result<()> {
    let own = nonce()?;
    let mut other = [0; NONCE_BYTES];
    let opening = [MAGIC.as_slice(), &own].concat();
    stream.write_all(&opening)?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(io::Error::other("the other side is no rank of hone, or one of another version"));
    }
    stream.read_exact(&mut other)?;
    let proof = |caller: bool| {
        let (first, second) = if calls { (&own, &other) } else { (&other, &own) };
        let side: &[u8] = if caller { b"calls" } else { b"takes" };
        let key = Sha256::digest(token.as_bytes());
        Sha256::digest([key.as_slice(), first, second, side].concat())
    };
    stream.write_all(&proof(calls))?;
    let mut shown = [0; 32];
    stream.read_exact(&mut shown)?;
    match shown[..] == proof(!calls)[..] {
        true => Ok(()),
        false => Err(io::Error::other("the other side belongs to another run: its token differs")),
    }
}

fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Returns a text that nobody can guess, for the ranks of one run.
pub fn token() -> io::Result<String> {
    Ok(nonce()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn proved(one: &str, two: &str) -> [io::Result<()>; 2] {
        let (mut caller, mut taker) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(move || prove(&mut taker, two, false));
            let own = prove(&mut caller, one, true);
            drop(caller);
            [own, other.join().unwrap()]
        })
    }

    #[test]
    fn both_sides_know_the_token_or_neither_goes_on() {
        assert!(proved("a", "a").iter().all(Result::is_ok));
        for side in proved("a", "b") {
            assert!(side.unwrap_err().to_string().contains("another run"));
        }
    }

    /// A caller that only returns the received bytes proves nothing.
    #[test]
    fn an_echo_is_no_rank() {
        let (mut caller, mut echo) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || io::copy(&mut echo.try_clone().unwrap(), &mut echo));
            assert!(prove(&mut caller, "a", true).is_err());
            drop(caller);
        });
        assert_ne!(token().unwrap(), token().unwrap());
    }

    #[test]
    fn frames_come_back_and_others_are_refused() {
        let fault = Fault::data("row 3").help("look");
        let frames = [Frame::bare(What::Beat), Frame::of(What::Failed, 2, &fault)];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut bytes).unwrap());
        let mut from = bytes.as_slice();
        assert_eq!(frames[0], Frame::read_known(&mut from).unwrap());
        let read = Frame::read_known(&mut from).unwrap();
        let back = read.fault();
        assert_eq!(
            (read.number, back.kind, back.message, back.help),
            (2, Kind::Data, fault.message, fault.help)
        );
        for cut in 0..bytes.len() {
            let mut from = &bytes[..cut];
            let whole = std::iter::from_fn(|| Frame::read_known(&mut from).ok()).count();
            assert!(whole < 2, "{cut}");
        }
        assert!(Frame::read(&mut &bytes[17..], 4).is_err(), "it is longer than is allowed");
        bytes[0] = 99;
        assert!(Frame::read_known(&mut bytes.as_slice()).is_err());
    }
}

//! The frame every stored row and every message between processes travels in.
//!
//! ```text
//! magic "EN" | format version u8 | kind u8 | payload length u32 | payload | BLAKE3 of all before, 8 bytes
//! ```
//!
//! Numbers are little-endian. The payload is bincode, which alone decodes flipped bits to wrong
//! values: the checksum is what makes a damaged frame an error.

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: [u8; 2] = *b"EN";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 8;

/// The largest payload that is written, and a sensible limit for reading, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What a frame holds. A number is never given to another kind, since frames outlive programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    /// [`crate::Accepted`].
    Accepted = 1,
    /// [`crate::Parsed`].
    Parsed = 2,
    /// [`crate::Kept`].
    Kept = 3,
    /// [`crate::Batch`].
    Batch = 4,
    /// [`crate::Candidate`].
    Candidate = 5,
    /// [`crate::Judgement`].
    Judgement = 6,
    /// [`crate::Publish`].
    Publish = 7,
    /// [`crate::Published`].
    Published = 8,
    /// [`crate::Generate`].
    Generate = 9,
    /// [`crate::GenerateEvent`].
    GenerateEvent = 10,
    /// A row that only the module which writes it can read.
    Row = 64,
}

/// Why a frame was refused.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// It is shorter or longer than its header says.
    #[error("the frame is {given} bytes long, its header says {expected}")]
    Length {
        /// Bytes there are.
        given: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// It does not start as a frame does.
    #[error("this is not a frame: its first bytes are wrong")]
    Magic,
    /// A version this program does not know.
    #[error("the frame has format version {given}; this program reads version {VERSION}")]
    Version {
        /// The version found.
        given: u8,
    },
    /// It holds something else.
    #[error("the frame holds kind {given}, wanted is {wanted:?}")]
    Kind {
        /// The number found.
        given: u8,
        /// What was asked for.
        wanted: Kind,
    },
    /// Its payload is larger than allowed.
    #[error("the frame's payload of {given} bytes is over the limit of {limit}")]
    TooLarge {
        /// Bytes there are.
        given: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Bits have changed since it was written.
    #[error("the frame is damaged: its checksum differs")]
    Damaged,
    /// The payload is not what the kind says, or cannot be put into bytes.
    #[error("the frame's payload cannot be converted: {0}")]
    Payload(#[from] bincode::Error),
}

/// Puts a message into a frame.
///
/// # Errors
/// When its payload is over [`PAYLOAD_BYTES_MAX`], or holds what bincode cannot carry.
pub fn encode<M: Serialize>(kind: Kind, message: &M) -> Result<Vec<u8>, WireError> {
    let mut frame = header(kind);
    bincode::Options::serialize_into(options(PAYLOAD_BYTES_MAX), &mut frame, message)?;
    finish(frame)
}

/// Takes a message out of a frame.
///
/// # Errors
/// When the frame is not whole and intact, holds another kind, or its payload is over `limit` bytes.
pub fn decode<M: DeserializeOwned>(kind: Kind, frame: &[u8], limit: usize) -> Result<M, WireError> {
    let payload = open(kind, frame, limit)?;
    Ok(bincode::Options::deserialize(options(limit), payload)?)
}

/// Puts bytes into a frame as they are.
///
/// # Errors
/// When they are over [`PAYLOAD_BYTES_MAX`].
pub fn seal(kind: Kind, payload: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut frame = header(kind);
    frame.extend_from_slice(payload);
    finish(frame)
}

/// The payload of a frame, once the frame is known to be whole and intact.
///
/// # Errors
/// As for [`decode`].
pub fn open(kind: Kind, frame: &[u8], limit: usize) -> Result<&[u8], WireError> {
    let least = HEADER_BYTES + CHECKSUM_BYTES;
    if frame.len() < least {
        return Err(WireError::Length { given: frame.len(), expected: least });
    }
    if frame[..2] != MAGIC {
        return Err(WireError::Magic);
    }
    if frame[2] != VERSION {
        return Err(WireError::Version { given: frame[2] });
    }
    if frame[3] != kind as u8 {
        return Err(WireError::Kind { given: frame[3], wanted: kind });
    }
    let length = u32::from_le_bytes([frame[4], frame[5], frame[6], frame[7]]) as usize;
    if length > limit {
        return Err(WireError::TooLarge { given: length, limit });
    }
    if frame.len() != least + length {
        return Err(WireError::Length { given: frame.len(), expected: least + length });
    }
    let (body, sum) = frame.split_at(HEADER_BYTES + length);
    if checksum(body) != sum {
        return Err(WireError::Damaged);
    }
    Ok(&body[HEADER_BYTES..])
}

/// Variable-length integers, since most numbers here are small; trailing bytes are an error.
fn options(limit: usize) -> impl bincode::Options {
    bincode::Options::with_limit(bincode::DefaultOptions::new(), limit as u64)
}

/// The header, with room for the payload's length, which [`finish`] fills in.
fn header(kind: Kind) -> Vec<u8> {
    vec![MAGIC[0], MAGIC[1], VERSION, kind as u8, 0, 0, 0, 0]
}

fn finish(mut frame: Vec<u8>) -> Result<Vec<u8>, WireError> {
    let length = frame.len() - HEADER_BYTES;
    let written = u32::try_from(length).ok().filter(|_| length <= PAYLOAD_BYTES_MAX);
    let Some(written) = written else {
        return Err(WireError::TooLarge { given: length, limit: PAYLOAD_BYTES_MAX });
    };
    frame[4..HEADER_BYTES].copy_from_slice(&written.to_le_bytes());
    let sum = checksum(&frame);
    frame.extend_from_slice(&sum);
    Ok(frame)
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&blake3::hash(body).as_bytes()[..CHECKSUM_BYTES]);
    sum
}

#[cfg(test)]
mod tests;

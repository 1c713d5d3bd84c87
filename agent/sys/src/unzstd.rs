//! Zstandard (RFC 8878) decoded by libzstd, translated to Rust function by function (libzstd-rs-sys): its interface is that of
//! the C library (zstd.h, "Streaming decompression"), raw pointers and all, so it is behind this door.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

use libzstd_rs_sys::{
    ZSTD_DCtx, ZSTD_DCtx_setParameter, ZSTD_createDCtx, ZSTD_dParameter, ZSTD_decompressStream, ZSTD_freeDCtx,
    ZSTD_getErrorName, ZSTD_inBuffer, ZSTD_isError, ZSTD_outBuffer,
};

/// A decoder with its window. It stays on the thread that made it.
pub struct Decoder(NonNull<ZSTD_DCtx>);

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub read: usize,
    pub written: usize,
    /// The frame is at its end, and all of it was written.
    pub is_end: bool,
}

/// Why a frame cannot be decoded, in the library's words. A decoder that said so is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(&'static str);

/// What `code` says: a number, or an error.
fn checked(code: usize) -> Result<usize, DecodeError> {
    if ZSTD_isError(code) == 0 {
        return Ok(code);
    }
    // SAFETY: ZSTD_getErrorName gives a NUL-terminated text of its own table, which is never freed.
    let text = unsafe { CStr::from_ptr(ZSTD_getErrorName(code)) };
    Err(DecodeError(text.to_str().unwrap_or("zstd")))
}

impl Decoder {
    /// One that refuses frames whose window is more than 2 to the `window_log_max` bytes, before it allocates them.
    pub fn new(window_log_max: u8) -> Result<Self, DecodeError> {
        // SAFETY: it takes no argument; what it gives is ours until ZSTD_freeDCtx in `drop`.
        let context = unsafe { ZSTD_createDCtx() };
        let decoder = Self(NonNull::new(context).ok_or(DecodeError("no memory"))?);
        decoder.set(ZSTD_dParameter::ZSTD_d_windowLogMax, c_int::from(window_log_max))?;
        // A frame may have a sum of its own at its end: whoever reads a layer holds it against better ones.
        decoder.set(ZSTD_dParameter::ZSTD_d_forceIgnoreChecksum, 1)?;
        Ok(decoder)
    }

    fn set(&self, parameter: ZSTD_dParameter, value: c_int) -> Result<(), DecodeError> {
        // SAFETY: the context is alive, and nobody else has it; the library checks the value.
        checked(unsafe { ZSTD_DCtx_setParameter(self.0.as_ptr(), parameter, value) }).map(drop)
    }

    /// Decodes as much as there is input and room for.
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, DecodeError> {
        let mut from = ZSTD_inBuffer { src: input.as_ptr().cast::<c_void>(), size: input.len(), pos: 0 };
        let mut to = ZSTD_outBuffer { dst: output.as_mut_ptr().cast::<c_void>(), size: output.len(), pos: 0 };
        // SAFETY: both buffers are alive during the call, as long as their slices say, and do not overlap (one is borrowed
        // for writing); the context is alive and ours alone (`&mut self`).
        let left = checked(unsafe { ZSTD_decompressStream(self.0.as_ptr(), &raw mut to, &raw mut from) })?;
        Ok(Step { read: from.pos, written: to.pos, is_end: left == 0 })
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: it came from ZSTD_createDCtx and is freed once, here.
        unsafe { ZSTD_freeDCtx(self.0.as_ptr()) };
    }
}

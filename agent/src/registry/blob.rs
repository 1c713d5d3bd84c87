//! A blob as one stream over as many requests as it takes: where the link broke, a range request goes on.

use std::io::{self, Read};
use std::time::Duration;

use edged_model::reason::Code;
use ureq::Body;
use ureq::http::{Response, StatusCode, header};

use super::source::BlobStream;
use super::traffic::Metered;
use super::{Client, RegistryError, SLOWEST_BYTES_PER_SEC, TRIES, broken, pause};

/// A try that brought less than this does not count as progress: a registry that gives a byte at a time is given up.
const PROGRESS_MIN_BYTES: u64 = 16 << 10;

pub struct BlobReader<'c> {
    client: &'c Client,
    path: String,
    at: u64,
    size: u64,
    body: Option<Box<dyn Read + Send>>,
    failures: u32,
    /// Where the last failure was.
    failed_at: u64,
    error: Option<RegistryError>,
}

impl<'c> BlobReader<'c> {
    pub(super) fn new(client: &'c Client, path: String, size: u64, from: u64) -> Self {
        Self { client, path, at: from.min(size), size, body: None, failures: 0, failed_at: from, error: None }
    }

    fn open(&mut self) -> Result<(), RegistryError> {
        let what = self.name();
        let from = (self.at > 0).then_some((self.at, None));
        let patience =
            self.client.document_timeout + Duration::from_secs((self.size - self.at) / SLOWEST_BYTES_PER_SEC);
        let response = self.client.get(&self.path, "*/*", from, patience, &what)?;
        let skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            if range_start(&response) != Some(self.at) {
                let text = format!("{what}: another range came than the one from byte {}", self.at);
                return Err(RegistryError::new(Code::RegistryUnavailable, text, false));
            }
            0
        } else {
            self.at
        };
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut body: Box<dyn Read + Send> = Box::new(Metered::new(body, &self.client.traffic));
        // A registry without ranges sends it all again: what is known already is read past.
        let passed = io::copy(&mut body.by_ref().take(skip), &mut io::sink()).map_err(|error| broken(&what, &error))?;
        if passed < skip {
            return Err(self.short());
        }
        self.body = Some(body);
        Ok(())
    }

    fn once(&mut self, buffer: &mut [u8]) -> Result<usize, RegistryError> {
        if self.body.is_none() {
            self.open()?;
        }
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        let take = buffer.len().min(left);
        let what = self.name();
        match self.body.as_mut().map_or(Ok(0), |body| body.read(&mut buffer[..take])) {
            Ok(0) => Err(self.short()),
            Ok(count) => Ok(count),
            Err(error) => Err(broken(&what, &error)),
        }
    }

    fn short(&self) -> RegistryError {
        let text = format!("{}: the body ended after {} of {} bytes", self.name(), self.at, self.size);
        RegistryError::new(Code::RegistryUnavailable, text, false)
    }

    fn name(&self) -> String {
        format!("{}{}", self.client.name, self.path)
    }
}

/// `Content-Range: bytes 100-199/200` begins at 100.
pub(super) fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.size || buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.once(buffer) {
                Ok(count) => {
                    self.at += count as u64;
                    return Ok(count);
                }
                Err(error) => {
                    self.body = None;
                    if self.at - self.failed_at >= PROGRESS_MIN_BYTES {
                        self.failures = 0;
                    }
                    self.failures += 1;
                    self.failed_at = self.at;
                    if error.is_final() || self.failures >= TRIES {
                        let text = error.reason.text.clone();
                        self.error = Some(error);
                        return Err(io::Error::other(text));
                    }
                    pause(self.failures, error.retry_after);
                }
            }
        }
    }
}

impl BlobStream for BlobReader<'_> {
    fn take_error(&mut self) -> Option<RegistryError> {
        self.error.take()
    }
}

//! An HTTP server that misbehaves on demand: every answer is the test's to write, down to the byte where it breaks off.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    /// How often this path has been asked for before.
    pub before: usize,
}

impl Request {
    /// Where a range request wants to begin.
    pub fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body, whatever its length was said to be.
    pub cut: Option<usize>,
    /// Of the body; else its real one.
    pub claimed_length: Option<u64>,
    /// The connection is closed without a word.
    pub silent: bool,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

type Behaviour = dyn Fn(&Request) -> Answer + Send + Sync;

pub struct FaultServer {
    pub host: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl FaultServer {
    /// The server lives as long as the test's process.
    pub fn start(behaviour: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let host = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (behaviour, log): (Arc<Behaviour>, _) = (Arc::new(behaviour), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, behaviour, log) = (stream.unwrap(), Arc::clone(&behaviour), Arc::clone(&log));
                std::thread::spawn(move || serve(stream, &*behaviour, &log));
            }
        });
        Self { host, seen }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

/// One request, one connection.
fn serve(mut stream: TcpStream, behaviour: &Behaviour, log: &Mutex<Vec<Request>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let request = {
        let mut log = log.lock().unwrap();
        let before = log.iter().filter(|request| request.path == path).count();
        let request = Request { path, headers, before };
        log.push(request.clone());
        request
    };
    let answer = behaviour(&request);
    if !answer.silent {
        let length = answer.claimed_length.unwrap_or(answer.body.len() as u64);
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {length}\r\n", answer.status);
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let body = &answer.body[..answer.cut.unwrap_or(answer.body.len()).min(answer.body.len())];
        stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
        stream.write_all(body).ok()?;
    }
    stream.shutdown(Shutdown::Both).ok()
}

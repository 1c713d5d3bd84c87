//! A small HTTP server for probes: one request per connection, one connection at a time. It is well until it has had
//! its number of requests, or until `/fail` is asked for; `/recover` makes it well again.
//! `/exit` ends it with code 3, `/hog` takes memory until it is stopped.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use crate::see;

pub fn http(port: &str, sick_after: u64) -> ExitCode {
    let listener = match TcpListener::bind(format!("0.0.0.0:{port}")) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("http: port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("http: listening on {port}");
    let mut is_well = true;
    for (number, connection) in listener.incoming().enumerate() {
        is_well &= (number as u64) < sick_after;
        match connection.and_then(|stream| answer(stream, &mut is_well)) {
            Ok(None) => {}
            Ok(Some(code)) => return ExitCode::from(code),
            Err(error) => eprintln!("http: {error}"),
        }
    }
    ExitCode::SUCCESS
}

/// The exit code, if it was told to end.
fn answer(stream: TcpStream, is_well: &mut bool) -> std::io::Result<Option<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    match path {
        "/fail" => *is_well = false,
        "/recover" => *is_well = true,
        _ => {}
    }
    let (status, body) = match path {
        "/fail" | "/recover" | "/exit" | "/hog" => ("200 OK", "done\n".to_owned()),
        "/limits" => ("200 OK", see::limits()),
        _ if !*is_well => ("503 Service Unavailable", "not well\n".to_owned()),
        _ => ("200 OK", "hello\n".to_owned()),
    };
    let mut stream = reader.into_inner();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    // In one piece, as servers do: who asks is not woken for each part.
    stream.write_all((head + &body).as_bytes())?;
    drop(stream);
    if path == "/hog" {
        crate::hog(usize::MAX);
    }
    Ok((path == "/exit").then_some(3))
}

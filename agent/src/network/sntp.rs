//! The time from outside: SNTP (RFC 4330, RFC 5905). Nobody has signed it, so it never decides alone: it may move a clock
//! forward, and what it may do beyond that is said where it is used. The wire is `rsntp`'s, which compares with the system
//! clock itself; here it is decided whom to ask and whose word counts. Blocking.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use rsntp::{Config, SntpClient};

/// Servers that are asked at one time.
const SERVERS_MAX: usize = 8;
/// An answer that took longer says little, and a network that is gone must not hold the others up.
const TIMEOUT: Duration = Duration::from_secs(3);
const PORT: u16 = 123;

/// What the servers say, taken together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Whose word it is.
    pub server: String,
    /// How far the system clock is behind (above zero) or ahead.
    pub behind_ms: i64,
    /// How many answered, of how many that were asked.
    pub answered: usize,
    pub asked: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no time server answers ({why})")]
pub struct NobodyAnswers {
    /// What the last one said.
    pub why: String,
}

/// Asks all of `servers` (`host` or `host:port`) and takes the middle of their answers, of two the earlier: one liar among
/// three changes nothing.
pub fn ask(servers: &[String]) -> Result<Heard, NobodyAnswers> {
    let mut answers = Vec::new();
    let mut why = "there is none to ask".to_owned();
    for server in servers.iter().take(SERVERS_MAX) {
        match ask_one(server) {
            Ok(behind_ms) => answers.push((behind_ms, server)),
            Err(error) => why = format!("{server}: {error}"),
        }
    }
    let (behind_ms, server) = middle(&mut answers).ok_or(NobodyAnswers { why })?;
    let asked = servers.len().min(SERVERS_MAX);
    Ok(Heard { server: server.clone(), behind_ms, answered: answers.len(), asked })
}

fn middle<T: Ord + Copy>(answers: &mut [T]) -> Option<T> {
    answers.sort_unstable();
    answers.get(answers.len().checked_sub(1)? / 2).copied()
}

fn ask_one(server: &str) -> Result<i64, String> {
    let address = address(server)?;
    let from = if address.is_ipv4() {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    let client = SntpClient::with_config(Config::default().bind_address(from).timeout(TIMEOUT));
    let answer = client.synchronize(address).map_err(|error| error.to_string())?;
    let behind = answer.clock_offset().as_secs_f64();
    // Both eras of the protocol fit into this many seconds; beyond it is no time.
    if !behind.is_finite() || behind.abs() > f64::from(u32::MAX) {
        return Err("an answer that is no time".to_owned());
    }
    #[expect(clippy::cast_possible_truncation, reason = "looked at one line above")]
    Ok((behind * 1000.0).round() as i64)
}

fn address(server: &str) -> Result<SocketAddr, String> {
    let found = if let Ok(address) = server.parse::<std::net::IpAddr>() {
        return Ok(SocketAddr::from((address, PORT)));
    } else if server.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        server.to_socket_addrs()
    } else {
        (server, PORT).to_socket_addrs()
    };
    let mut found = found.map_err(|error| error.to_string())?;
    found.next().ok_or_else(|| "the name has no address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn one_liar_among_three_changes_nothing() {
        assert_eq!(middle(&mut [7]), Some(7));
        assert_eq!(middle(&mut [9_999_999, 5]), Some(5), "of two the earlier");
        assert_eq!(middle(&mut [6, 9_999_999, 5]), Some(6));
        assert_eq!(middle(&mut [6, -9_999_999, 5]), Some(5));
        assert_eq!(middle::<i64>(&mut []), None);
    }

    #[test]
    fn servers_are_named_with_and_without_a_port() {
        for (name, port) in [("127.0.0.1", 123), ("127.0.0.1:9", 9), ("::1", 123), ("[::1]:9", 9), ("localhost:9", 9)] {
            assert_eq!(address(name).unwrap().port(), port, "{name}");
        }
        assert!(address("").is_err());
    }

    #[test]
    fn what_is_no_answer_is_none() {
        let deaf = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = deaf.local_addr().unwrap().to_string();
        let answering = std::thread::spawn(move || {
            let mut request = [0; 128];
            let (length, from) = deaf.recv_from(&mut request).unwrap();
            // The question itself: its mode is that of a client.
            deaf.send_to(&request[..length], from).unwrap();
        });
        let refused = ask(std::slice::from_ref(&server)).unwrap_err();
        assert!(refused.why.contains(&server), "{refused}");
        answering.join().unwrap();
        assert!(ask(&[]).unwrap_err().why.contains("none to ask"));
    }
}

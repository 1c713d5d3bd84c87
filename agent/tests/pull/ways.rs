//! How a registry is reached: through a proxy, and as somebody.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use edged::config;
use edged_model::reason::Code;

use super::support::registry::Registry;
use super::{Device, sample};

/// A proxy that knows CONNECT only; what it was asked for, with the password that came along.
fn proxy() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, log) = (client.unwrap(), Arc::clone(&log));
            std::thread::spawn(move || connect(client, &log));
        }
    });
    (address, asked)
}

fn connect(mut client: TcpStream, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    let mut head = String::new();
    while reader.read_line(&mut head).ok()? > 2 {}
    let target = head.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
    log.lock().unwrap().push(head);
    let server = TcpStream::connect(target).ok()?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
    let (mut to_server, mut from_server) = (server.try_clone().ok()?, server);
    let mut to_client = client;
    std::thread::spawn(move || std::io::copy(&mut reader, &mut to_server));
    std::io::copy(&mut from_server, &mut to_client).ok().map(drop)
}

#[test]
fn a_registry_behind_a_proxy_is_asked_through_it_and_a_password_is_never_told() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "app:v1", &[]);
    let image = format!("{}/app@{digest}", registry.host());
    let with = |proxy: String| {
        let config = config::Registry { proxy: Some(proxy), ..registry.config() };
        Device::new([(registry.host(), config)]).trusting_digests().pull(&image)
    };
    let (address, asked) = proxy();
    with(format!("http://user:s3cret@{address}")).unwrap();
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty() && asked.iter().all(|head| head.contains(&registry.host())), "{asked:?}");
    assert!(asked[0].to_lowercase().contains("proxy-authorization: basic dxnlcjpzm2nyzxq="), "{asked:?}");

    let failure = with("http://user:s3cret@127.0.0.1:1".to_owned()).unwrap_err();
    assert_eq!(failure.reason.code, Code::RegistryUnavailable, "{failure:?}");
    for bad in ["socks9://user:s3cret@x", "http://user:s3cret@:::", "user:s3cret"] {
        let reason = with(bad.to_owned()).unwrap_err().reason;
        assert!(reason.text.contains("http://[user:password@]host:port"), "{bad}: {reason}");
        assert!(!reason.text.contains("s3cret"), "{reason}");
    }
}

#[test]
fn a_registry_that_asks_who_one_is_gets_the_devices_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start_asking_for_certificates();
    let (layout, _) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "app:v1", &[]);
    let image = format!("{}/app@{digest}", registry.host());
    let (cert, key) = registry.client();
    let with = |client_cert: Option<&Path>, client_key: Option<&Path>| {
        let [client_cert, client_key] = [client_cert, client_key].map(|path| path.map(Path::to_owned));
        let config = config::Registry { client_cert, client_key, ..registry.config() };
        Device::new([(registry.host(), config)]).trusting_digests().pull(&image)
    };
    with(Some(&cert), Some(&key)).unwrap();
    assert_eq!(with(None, None).unwrap_err().reason.code, Code::RegistryUnavailable);
    let said = |cert: Option<&Path>, key: Option<&Path>| with(cert, key).unwrap_err().reason.text;
    // Another key than the certificate's.
    super::support::openssl(dir.path(), "genpkey -algorithm ed25519 -out other.key");
    let other = dir.path().join("other.key");
    assert!(said(Some(&cert), Some(&other)).contains("client-cert of"));
    assert!(said(Some(&cert), None).contains("need each other"));
    assert!(said(Some(&cert), Some(&cert)).contains("no private key"));
    assert!(said(Some(&key), Some(&key)).contains("no certificate"));
    assert!(said(Some(&dir.path().join("none")), Some(&key)).contains("none"));
}

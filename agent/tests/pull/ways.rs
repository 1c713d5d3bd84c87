//! How a registry is reached: through a proxy, and as somebody.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use edged::config;
use edged_model::reason::Code;

use super::shelf::Shelf;
use super::support::faults::{Answer, Authority, FaultServer, Request};
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

/// What `agent.toml` says of a registry of this authority that wants to know who one is.
fn asking_who_one_is(authority: &Authority, dir: &Path) -> config::Registry {
    let (client_cert, client_key) = authority.client(dir);
    config::Registry {
        ca: Some(authority.file.clone()),
        client_cert: Some(client_cert),
        client_key: Some(client_key),
        username: Some("u".to_owned()),
        password: Some("p".to_owned()),
        ..config::Registry::default()
    }
}

/// Where a registry sends whoever asks it for a blob.
fn redirecting(shelf: &Shelf, to: impl Fn(&str) -> String) -> impl Fn(&Request) -> Answer {
    move |request| match request.path.strip_prefix("/v2/") {
        Some(path) if path.contains("/blobs/") => Answer::new(307, "").header("Location", to(path)),
        _ => shelf.answer(request),
    }
}

#[test]
fn the_devices_certificate_is_shown_to_the_registry_and_to_no_other_host() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let (shelf, digest) = Shelf::with_sample();
    let config = asking_who_one_is(&authority, dir.path());

    let has = shelf.clone();
    let storage = FaultServer::start_with(Some(authority.server()), move |request| has.answer(request));
    let tokens = FaultServer::start_with(Some(authority.server()), |_| Answer::new(200, r#"{"token":"t0ken"}"#));
    let realm = format!("Bearer realm=\"https://{}/token\",service=\"r\",scope=\"s\"", tokens.host);
    let (elsewhere, has) = (storage.host.clone(), shelf.clone());
    let registry = FaultServer::start_with(Some(authority.server()), move |request| {
        if request.path.starts_with("/v2/")
            && request.headers.get("authorization").is_none_or(|it| it != "Bearer t0ken")
        {
            return Answer::new(401, "").header("WWW-Authenticate", realm.clone());
        }
        // The configuration is kept at the registry itself, elsewhere; the layers are not.
        let is_small =
            |path: &str| has.answer(&Request { path: format!("/{path}"), ..request.clone() }).body.len() < 1000;
        redirecting(&has, |path| match is_small(path) {
            true => format!("/kept/{path}"),
            false => format!("https://{elsewhere}/kept/{path}"),
        })(request)
    });
    let device = Device::new([(registry.host.clone(), config)]).trusting_digests();
    device.pull(&format!("{}/app@{digest}", registry.host)).unwrap();

    let seen = |server: &FaultServer, what: fn(&Request) -> bool| {
        let requests = server.requests();
        assert!(!requests.is_empty());
        requests.iter().filter(|request| what(request)).count()
    };
    assert_eq!(seen(&registry, |request| !request.has_certificate), 0, "the registry knows who asks");
    assert!(seen(&registry, |request| request.path.starts_with("/kept/")) > 0);
    for server in [&storage, &tokens] {
        assert_eq!(seen(server, |request| request.has_certificate), 0, "nobody else does");
    }
    assert_eq!(seen(&storage, |request| request.headers.contains_key("authorization")), 0);
}

#[test]
fn a_redirect_to_a_host_of_an_unknown_authority_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(dir.path(), "ours"), Authority::new(dir.path(), "theirs"));
    let (shelf, digest) = Shelf::with_sample();
    let storage = FaultServer::start_with(Some(theirs.server()), |_| Answer::new(200, ""));
    let elsewhere = storage.host.clone();
    let registry = FaultServer::start_with(Some(ours.server()), move |request| {
        redirecting(&shelf, |path| format!("https://{elsewhere}/{path}"))(request)
    });
    let config = asking_who_one_is(&ours, dir.path());
    let device = Device::new([(registry.host.clone(), config)]).trusting_digests();
    let reason = device.pull(&format!("{}/app@{digest}", registry.host)).unwrap_err().reason;
    assert_eq!(reason.code, Code::RegistryUnavailable, "{reason}");
    assert!(reason.text.contains("certificate") && reason.text.contains(&storage.host), "{reason}");
    assert!(storage.requests().is_empty());
}

#[test]
fn what_began_encrypted_goes_on_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let (shelf, digest) = Shelf::with_sample();
    let has = shelf.clone();
    let in_the_clear = FaultServer::start(move |request| has.answer(request));
    let refused = |behaviour: Box<dyn Fn(&Request) -> Answer + Send + Sync>| {
        let registry = FaultServer::start_with(Some(authority.server()), behaviour);
        let config = asking_who_one_is(&authority, dir.path());
        let device = Device::new([(registry.host.clone(), config)]).trusting_digests();
        let reason = device.pull(&format!("{}/app@{digest}", registry.host)).unwrap_err().reason;
        assert!(device.has_nothing_half_done());
        reason
    };
    let elsewhere = in_the_clear.host.clone();
    let redirected =
        refused(Box::new(move |request| redirecting(&shelf, |path| format!("http://{elsewhere}/v2/{path}"))(request)));
    assert_eq!(redirected.code, Code::RegistryRefused, "{redirected}");
    assert!(redirected.text.contains("redirected to a place without encryption"), "{redirected}");

    let realm = format!("Bearer realm=\"http://{}/token\",service=\"r\",scope=\"s\"", in_the_clear.host);
    let asked = refused(Box::new(move |_| Answer::new(401, "").header("WWW-Authenticate", realm.clone())));
    assert_eq!(asked.code, Code::ImageUnauthorized, "{asked}");
    assert!(asked.text.contains("its token service is not encrypted"), "{asked}");
    assert!(in_the_clear.requests().is_empty(), "nothing was asked in the clear, no password told");
}

#[test]
fn a_registry_whose_certificate_ended_before_the_time_floor_is_not_believed_whatever_the_clock_says() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "app:v1", &[]);
    let image = format!("{}/app@{digest}", registry.host());
    let device = Device::new([(registry.host(), registry.config())]).trusting_digests();
    device.ctx.floor.raise("3000-01-01T00:00:00Z".parse().unwrap());
    let why = device.pull(&image).unwrap_err().reason;
    assert!(why.code == Code::RegistryUnavailable && why.text.contains("certificate expired"), "{why}");
    let device = Device::new([(registry.host(), registry.config())]).trusting_digests();
    device.ctx.floor.raise("2026-01-01T00:00:00Z".parse().unwrap());
    device.pull(&image).unwrap();
}

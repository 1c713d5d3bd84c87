//! The way kubelets go: containerd's CRI service, with this runtime below its shim. What is said is gRPC, by hand: requests
//! are small, each has a connection of its own, and of an answer only the message is read. Pods are on the host's network:
//! another one is the engine's plugins' business, not the runtime's.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::containerd::{Containerd, IMAGE};
use crate::rig::{program, until};

/// A protobuf message: fields with their numbers (protobuf.dev/programming-guides/encoding).
#[derive(Default, Clone)]
struct Message(Vec<u8>);

impl Message {
    fn number(mut self, field: u8, mut value: u64) -> Self {
        self.0.push(field << 3);
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        // The wire type of bytes is 2; their length is a number like those above.
        let length = Self::default().number(0, value.len() as u64).0;
        self.0.push(field << 3 | 2);
        self.0.extend_from_slice(&length[1..]);
        self.0.extend_from_slice(value);
        self
    }

    fn text(self, field: u8, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u8, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    /// The fields of that number: numbers, and bytes.
    fn fields(&self, wanted: u64) -> (Vec<u64>, Vec<Self>) {
        let (mut numbers, mut messages) = (Vec::new(), Vec::new());
        let mut rest = self.0.as_slice();
        while !rest.is_empty() {
            let key = varint(&mut rest);
            let value = varint(&mut rest);
            if key & 7 == 0 {
                numbers.extend((key >> 3 == wanted).then_some(value));
                continue;
            }
            assert_eq!(key & 7, 2, "a field of a kind that CRI does not have");
            let (bytes, after) = rest.split_at(value as usize);
            messages.extend((key >> 3 == wanted).then(|| Self(bytes.to_vec())));
            rest = after;
        }
        (numbers, messages)
    }

    /// What is left out is empty.
    fn at(&self, field: u64) -> Self {
        self.fields(field).1.pop().unwrap_or_default()
    }

    fn number_at(&self, field: u64) -> u64 {
        self.fields(field).0.pop().unwrap_or(0)
    }

    fn text_at(&self, field: u64) -> String {
        String::from_utf8(self.at(field).0).unwrap()
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}

/// HTTP/2 (RFC 9113): the kinds of frame and the flags that are met here.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// One call. `None`: it was refused.
fn call(socket: &Path, service: &str, method: &str, request: &Message) -> Option<Message> {
    let path = format!("/runtime.v1.{service}/{method}");
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let mut block = Vec::new();
    for (name, value) in headers {
        // A literal that goes into no table (RFC 7541, 6.2.2).
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    let mut body = vec![0];
    body.extend(u32::try_from(request.0.len()).unwrap().to_be_bytes());
    body.extend(&request.0);
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    let frames =
        [frame(SETTINGS, 0, 0, &[]), frame(HEADERS, END_HEADERS, 1, &block), frame(DATA, END_STREAM, 1, &body)];
    stream.write_all(&frames.concat()).unwrap();
    let mut answer = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).unwrap();
        match (head[3], head[4]) {
            (DATA, _) => answer.extend(payload),
            (SETTINGS, flags) if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).unwrap(),
            (HEADERS, flags) if flags & END_STREAM != 0 => break,
            _ => {}
        }
    }
    // Five bytes say whether it is packed, and how long it is.
    (answer.len() >= 5).then(|| Message(answer.split_off(5)))
}

struct Cri {
    containerd: Containerd,
}

impl Cri {
    fn new() -> Self {
        Self {
            containerd: Containerd::of("k8s.io", |dir| {
                let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
                // Root here may not lower the score that the kernel's killer goes by.
                format!(
                    "[{plugin}]\nsandbox_image = \"{IMAGE}\"\nrestrict_oom_score_adj = true\n\
                     [{plugin}.containerd]\ndefault_runtime_name = \"edged\"\n\
                     [{plugin}.containerd.runtimes.edged]\nruntime_type = \"io.containerd.runc.v2\"\n\
                     [{plugin}.containerd.runtimes.edged.options]\nBinaryName = \"{}\"\nRoot = \"{}\"\n",
                    program().display(),
                    dir.join("oci").display()
                )
            }),
        }
    }

    fn try_call(&self, method: &str, request: &Message) -> Option<Message> {
        let service = if method.starts_with("Image") { "ImageService" } else { "RuntimeService" };
        call(&self.containerd.socket(), service, method, request)
    }

    #[track_caller]
    fn call(&self, method: &str, request: &Message) -> Message {
        self.try_call(method, request).unwrap_or_else(|| panic!("{method} was refused; the engine's log says why"))
    }

    /// Whatever takes an id alone.
    #[track_caller]
    fn about(&self, method: &str, id: &str) -> Message {
        self.call(method, &Message::default().text(1, id))
    }

    fn create(&self, pod: &str, config: &Message, name: &str, script: &str) -> String {
        let resources = Message::default().number(1, 100_000).number(2, 50_000).number(4, 33_554_432);
        // Processes of its own; the host's network; IPC is the pod's.
        let namespaces = Message::default().number(1, NODE).number(2, CONTAINER);
        let linux = Message::default().message(1, &resources).message(2, &Message::default().message(3, &namespaces));
        let environment = Message::default().text(1, "A").text(2, "b");
        let container = Message::default()
            .message(1, &Message::default().text(1, name))
            .message(2, &Message::default().text(1, IMAGE))
            .text(3, "sh")
            .text(4, "-c")
            .text(4, script)
            .message(6, &environment)
            .text(11, &format!("{name}.log"))
            .message(15, &linux);
        let request = Message::default().text(1, pod).message(2, &container).message(3, config);
        self.call("CreateContainer", &request).text_at(1)
    }

    /// Standard output and exit code.
    fn exec(&self, id: &str, script: &str) -> (String, u64) {
        let request = Message::default().text(1, id).text(2, "sh").text(2, "-c").text(2, script).number(3, 20);
        let answer = self.call("ExecSync", &request);
        (answer.text_at(1), answer.number_at(3))
    }

    /// State and exit code.
    fn status(&self, id: &str) -> (u64, u64) {
        let status = self.about("ContainerStatus", id).at(1);
        (status.number_at(3), status.number_at(7))
    }
}

/// Of namespaces.
const CONTAINER: u64 = 1;
const NODE: u64 = 2;

/// Of containers.
const RUNNING: u64 = 1;
const EXITED: u64 = 2;

#[test]
fn a_kubelet_runs_pods() {
    let cri = Cri::new();
    let logs = cri.containerd.dir.path().join("logs");
    let image = Message::default().message(1, &Message::default().text(1, IMAGE));
    until("the image", || (!cri.try_call("ImageStatus", &image)?.at(1).0.is_empty()).then_some(()));
    let namespaces = Message::default().number(1, NODE).number(2, CONTAINER);
    let linux = Message::default()
        .text(1, &format!("/{}", cri.containerd.group))
        .message(2, &Message::default().message(1, &namespaces));
    let config = Message::default()
        .message(1, &Message::default().text(1, "pod").text(2, "uid").text(3, "tests"))
        .text(3, logs.to_str().unwrap())
        .message(8, &linux);
    let pod = cri.call("RunPodSandbox", &Message::default().message(1, &config)).text_at(1);

    let web = cri.create(&pod, &config, "web", "trap 'exit 5' TERM; echo $A; while :; do sleep 0.05; done");
    let other = cri.create(&pod, &config, "other", "while :; do sleep 0.05; done");
    for id in [&web, &other] {
        cri.about("StartContainer", id);
        assert_eq!(cri.status(id).0, RUNNING);
    }
    assert_eq!(cri.containerd.kept().len(), 3, "the pod's own and the two are this runtime's");
    until("what it prints", || fs::read_to_string(logs.join("web.log")).ok()?.contains("stdout F b").then_some(()));
    assert_eq!(cri.exec(&web, "echo in; exit 4"), ("in\n".to_owned(), 4));
    let namespace = |id: &str, kind: &str| cri.exec(id, &format!("readlink /proc/self/ns/{kind}")).0;
    assert_eq!(namespace(&web, "ipc"), namespace(&other, "ipc"), "the pod's");
    assert_ne!(namespace(&web, "pid"), namespace(&other, "pid"));
    let host = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(namespace(&web, "net").trim(), host.to_str().unwrap());

    let limit = || cri.containerd.limit(&web, "memory/memory.limit_in_bytes", "memory.max");
    assert_eq!(limit(), "33554432");
    let resources = Message::default().number(4, 50_331_648);
    cri.call("UpdateContainerResources", &Message::default().text(1, &web).message(2, &resources));
    assert_eq!(limit(), "50331648");
    let missing = Message::default().text(1, &web).text(2, "no-such-program").number(3, 20);
    assert!(cri.try_call("ExecSync", &missing).is_none());

    cri.call("StopContainer", &Message::default().text(1, &web).number(2, 20));
    assert_eq!(cri.status(&web), (EXITED, 5), "it was asked, not killed");
    cri.about("RemoveContainer", &web);
    // With all that is in it.
    cri.about("StopPodSandbox", &pod);
    assert_eq!(cri.status(&other).0, EXITED);
    cri.about("RemovePodSandbox", &pod);
    assert!(cri.try_call("ContainerStatus", &Message::default().text(1, &other)).is_none());
    assert!(cri.containerd.kept().is_empty(), "{:?}", cri.containerd.kept());
}

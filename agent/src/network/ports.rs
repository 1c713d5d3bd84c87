//! Published ports: the agent listens on the device and connects to the workload's own loopback inside its namespace.
//! No bridge, no address translation and no rule of a firewall is needed for it. While the agent restarts (well under a
//! second) new connections are refused; the workload itself does not notice.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use edged_model::id::WorkloadName;
use edged_model::manifest::Port;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::netns;

/// Connections of one port at a time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The listeners of all workloads.
#[derive(Default)]
pub struct Ports {
    open: BTreeMap<WorkloadName, (Vec<Port>, Vec<JoinHandle<()>>)>,
}

impl Ports {
    /// Makes the listeners of a workload those of `ports`. What did not change stays open.
    pub async fn publish(&mut self, workload: &WorkloadName, ports: &[Port], netns: &Path) -> io::Result<()> {
        if self.open.get(workload).is_some_and(|(open, _)| open == ports) {
            return Ok(());
        }
        self.close(workload);
        let mut tasks = Vec::new();
        for port in ports {
            let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port.host))).await?;
            tasks.push(tokio::spawn(serve(listener, port.container, netns.to_owned())));
        }
        self.open.insert(workload.clone(), (ports.to_vec(), tasks));
        Ok(())
    }

    pub fn close(&mut self, workload: &WorkloadName) {
        for task in self.open.remove(workload).into_iter().flat_map(|(_, tasks)| tasks) {
            task.abort();
        }
    }
}

async fn serve(listener: TcpListener, container: u16, netns: PathBuf) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        // An error of accept is of one connection, or of a lack that passes.
        let Ok((outside, _)) = listener.accept().await else { continue };
        let netns = netns.clone();
        tokio::spawn(async move {
            let _slot = slot;
            // The workload does not listen, or the connection broke: closing it is all that can be said.
            let _ = forward(outside, container, netns).await;
        });
    }
}

async fn forward(mut outside: TcpStream, container: u16, netns: PathBuf) -> io::Result<()> {
    let address = SocketAddr::from(([127, 0, 0, 1], container));
    let inside = tokio::task::spawn_blocking(move || netns::connect_in_netns(&netns, address, CONNECT_TIMEOUT));
    let inside = inside.await.map_err(io::Error::other)??;
    inside.set_nonblocking(true)?;
    let mut inside = TcpStream::from_std(inside)?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await.map(drop)
}

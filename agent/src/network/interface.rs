//! The device's own interface: an address from DHCP (RFC 2131), or the one in `agent.toml`. Runs beside everything else;
//! nothing waits for it.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use futures_util::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::config::{InterfaceMode, Network};

#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("no Ethernet interface is there")]
    NoInterface,
    #[error("network.{key} in agent.toml: `{value}`")]
    Config { key: &'static str, value: String },
    #[error("netlink")]
    Netlink(#[from] rtnetlink::Error),
    #[error("DHCP")]
    Dhcp(#[from] mozim::DhcpError),
    #[error("network")]
    Io(#[from] io::Error),
}

/// What an interface is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addressing {
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Option<Ipv4Addr>,
    pub dns: Vec<IpAddr>,
}

/// The interface may appear late (a USB modem); looked for again this often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How the interface is now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// In words.
    pub text: String,
    /// Those that came with the lease (option 42 of RFC 2132).
    pub time_servers: Vec<String>,
}

impl From<String> for State {
    fn from(text: String) -> Self {
        Self { text, time_servers: Vec::new() }
    }
}

/// Sets the interface up and keeps it so. `tell` gets each new state.
pub async fn run(config: Network, resolv_conf: std::path::PathBuf, tell: impl Fn(State)) {
    if config.mode == InterfaceMode::None {
        return;
    }
    loop {
        match set_up(&config, &resolv_conf, &tell).await {
            Ok(()) => return,
            Err(error) => tell(format!("no network: {}", crate::store::inline_chain(&error)).into()),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn set_up(config: &Network, resolv_conf: &Path, tell: &impl Fn(State)) -> Result<(), InterfaceError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let netlink = tokio::spawn(connection);
    let result = with_netlink(config, resolv_conf, tell, &handle).await;
    netlink.abort();
    result
}

async fn with_netlink(
    config: &Network,
    resolv_conf: &Path,
    tell: &impl Fn(State),
    handle: &Handle,
) -> Result<(), InterfaceError> {
    let name = config.interface.clone().or_else(first_ethernet).ok_or(InterfaceError::NoInterface)?;
    let mut links = handle.link().get().match_name(name.clone()).execute();
    let link = links.try_next().await?.ok_or(InterfaceError::NoInterface)?;
    let index = link.header.index;
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
    match config.mode {
        InterfaceMode::None => Ok(()),
        InterfaceMode::Static => {
            let addressing = from_config(config)?;
            apply(handle, index, &addressing, resolv_conf).await?;
            tell(format!("{name} has {}/{}", addressing.address, addressing.prefix).into());
            Ok(())
        }
        InterfaceMode::Dhcp => {
            let mut client = mozim::DhcpV4Client::init(mozim::DhcpV4Config::new(&name), None).await?;
            loop {
                // Each lease, first and renewed; the client keeps the times of RFC 2131, 4.4.5.
                if let mozim::DhcpV4State::Done(lease) = client.run().await? {
                    let addressing = from_lease(&lease, &config.dns);
                    apply(handle, index, &addressing, resolv_conf).await?;
                    let text = format!("{name} has {}/{} by DHCP", addressing.address, addressing.prefix);
                    tell(State { text, time_servers: time_servers(&lease) });
                }
            }
        }
    }
}

/// The first interface with a device behind it and an Ethernet address (ARPHRD_ETHER, 1).
fn first_ethernet() -> Option<String> {
    let mut names: Vec<_> = std::fs::read_dir("/sys/class/net")
        .ok()?
        .filter_map(Result::ok)
        .filter(|entry| entry.path().join("device").exists())
        .filter(|entry| std::fs::read_to_string(entry.path().join("type")).is_ok_and(|kind| kind.trim() == "1"))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.into_iter().next()
}

fn from_config(config: &Network) -> Result<Addressing, InterfaceError> {
    let bad = |key, value: &str| InterfaceError::Config { key, value: value.to_owned() };
    let text = config.address.as_deref().unwrap_or_default();
    let (address, prefix) = text.split_once('/').ok_or_else(|| bad("address", text))?;
    let prefix: u8 = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(|| bad("address", text))?;
    let gateway = match &config.gateway {
        Some(text) => Some(text.parse().map_err(|_| bad("gateway", text))?),
        None => None,
    };
    let dns = config.dns.iter().map(|text| text.parse().map_err(|_| bad("dns", text))).collect::<Result<_, _>>()?;
    Ok(Addressing { address: address.parse().map_err(|_| bad("address", text))?, prefix, gateway, dns })
}

fn from_lease(lease: &mozim::DhcpV4Lease, configured_dns: &[String]) -> Addressing {
    let configured: Vec<IpAddr> = configured_dns.iter().filter_map(|text| text.parse().ok()).collect();
    let offered = lease.dns_srvs.iter().flatten().map(|address| IpAddr::V4(*address)).collect();
    Addressing {
        address: lease.yiaddr,
        prefix: u8::try_from(u32::from(lease.subnet_mask).count_ones()).unwrap_or(32),
        gateway: lease.gateways.as_ref().and_then(|gateways| gateways.first().copied()),
        dns: if configured.is_empty() { offered } else { configured },
    }
}

fn time_servers(lease: &mozim::DhcpV4Lease) -> Vec<String> {
    lease.ntp_srvs.iter().flatten().map(Ipv4Addr::to_string).collect()
}

async fn apply(handle: &Handle, index: u32, addressing: &Addressing, resolv_conf: &Path) -> Result<(), InterfaceError> {
    let address = IpAddr::V4(addressing.address);
    handle.address().add(index, address, addressing.prefix).replace().execute().await?;
    if let Some(gateway) = addressing.gateway {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build();
        handle.route().add(route).replace().execute().await?;
    }
    let text: String = addressing.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    std::fs::write(resolv_conf, text)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_from_the_configuration() {
        let config = Network {
            address: Some("192.0.2.10/24".to_owned()),
            gateway: Some("192.0.2.1".to_owned()),
            dns: vec!["192.0.2.2".to_owned()],
            ..Network::default()
        };
        let addressing = from_config(&config).unwrap();
        assert_eq!((addressing.address, addressing.prefix), (Ipv4Addr::new(192, 0, 2, 10), 24));
        for bad in ["", "192.0.2.10", "192.0.2.10/33", "x/24"] {
            let config = Network { address: Some(bad.to_owned()), ..Network::default() };
            assert!(from_config(&config).is_err(), "{bad}");
        }
    }
}

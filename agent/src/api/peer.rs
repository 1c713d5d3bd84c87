//! Who may talk to the agent: root, the agent's own user, and the members of one group.
//!
//! The group files are read here and not through getgrnam(3), which loads shared libraries: the agent is one static
//! program on devices that may have none.

use edged_model::reason::{Code, Reason};

/// As SO_PEERCRED (unix(7)) gives it: the kernel's word, not the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
}

/// The group that may come in besides root.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allowed {
    pub group: String,
    /// `None`: this machine has no such group, so only root may come.
    pub gid: Option<u32>,
    /// Users whose second, third, … group it is.
    pub members: Vec<u32>,
    /// The user the agent itself runs as.
    pub own_uid: u32,
}

impl Allowed {
    /// Looks the group up in this machine's files.
    pub fn group_named(name: &str) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let own_uid = nix::unistd::geteuid().as_raw();
        Self::from_files(name, &read("/etc/group"), &read("/etc/passwd"), own_uid)
    }

    /// group(5): `name:password:gid:members`; passwd(5): `name:password:uid:…`.
    fn from_files(name: &str, group: &str, passwd: &str, own_uid: u32) -> Self {
        let field = |line: &str, n: usize| line.split(':').nth(n).map(str::to_owned);
        let line = group.lines().find(|line| field(line, 0).as_deref() == Some(name));
        let gid = line.and_then(|line| field(line, 2)).and_then(|text| text.parse().ok());
        let names = line.and_then(|line| field(line, 3)).unwrap_or_default();
        let uid_of = |user: &str| {
            let line = passwd.lines().find(|line| field(line, 0).as_deref() == Some(user))?;
            field(line, 2)?.parse().ok()
        };
        let members = names.split(',').filter(|user| !user.is_empty()).filter_map(uid_of).collect();
        Self { group: name.to_owned(), gid, members, own_uid }
    }

    pub fn check(&self, peer: Peer) -> Result<(), Reason> {
        let by_group = self.gid.is_some_and(|gid| gid == peer.gid || self.members.contains(&peer.uid));
        if peer.uid == 0 || peer.uid == self.own_uid || by_group {
            return Ok(());
        }
        let text = format!("uid {} may not talk to the agent: only root and the group `{}` may", peer.uid, self.group);
        let next = match self.gid {
            Some(_) => {
                format!("`usermod -aG {} USER` makes a user a member; the agent reads it when it starts", self.group)
            }
            None => format!(
                "this machine has no group `{}`: make it, or name another as api.group in agent.toml",
                self.group
            ),
        };
        Err(Reason::new(Code::NotAllowedHere, text).next(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_agents_user_and_the_group_come_in_nobody_else() {
        let group = "root:x:0:\nedged:x:77:ann,gone\nwheel:x:10:bob\n";
        let passwd = "root:x:0:0::/:/bin/sh\nann:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\n";
        let allowed = Allowed::from_files("edged", group, passwd, 50);
        assert_eq!((allowed.gid, allowed.members.as_slice()), (Some(77), &[1000][..]));
        for (uid, gid) in [(0, 0), (50, 50), (1000, 1000), (1001, 77)] {
            assert_eq!(allowed.check(Peer { uid, gid }), Ok(()), "{uid} {gid}");
        }
        let refused = allowed.check(Peer { uid: 1001, gid: 1001 }).unwrap_err();
        assert!(refused.text.contains("uid 1001") && refused.next.contains("usermod"), "{refused}");
        let none = Allowed::from_files("absent", group, passwd, 50);
        assert!(none.check(Peer { uid: 1000, gid: 1000 }).unwrap_err().next.contains("no group `absent`"));
    }

    #[test]
    fn broken_files_let_nobody_in() {
        for text in ["", "edged", "edged:x", "edged:x:many:", ":::::", "edged:x:99999999999:a"] {
            let allowed = Allowed::from_files("edged", text, text, 50);
            assert!(allowed.check(Peer { uid: 1000, gid: 1000 }).is_err(), "{text}");
        }
    }
}

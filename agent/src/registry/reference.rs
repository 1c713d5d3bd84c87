//! Image names: `host[:port]/repository[:tag][@sha256:…]`. Short names such as `nginx` are refused: which registry they
//! mean is a matter of somebody's configuration, and a signed manifest shall not depend on it.

use std::fmt;
use std::net::Ipv6Addr;

use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};

use super::layout::LayoutReference;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Host and port, as the configuration spells them.
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

impl Reference {
    pub fn parse(text: &str) -> Result<Self, Reason> {
        let bad = |why: &str| {
            Reason::new(Code::InvalidManifest, format!("image `{text}`: {why}"))
                .next("write it as `host[:port]/repository@sha256:…` or `host[:port]/repository:tag`")
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(|error| bad(&error.to_string()))?)),
            None => (text, None),
        };
        let (registry, path) = rest.split_once('/').ok_or_else(|| bad("no registry is named"))?;
        if !(registry.contains(['.', ':']) || registry == "localhost") {
            return Err(bad("no registry is named"));
        }
        if LayoutReference::is_one(text) {
            return Err(bad("a name that begins with `oci:` is an image on this device's disk, not in a registry"));
        }
        if !is_host_and_port(registry) {
            return Err(bad("the registry is not `host`, `host:port` or `[IPv6 address]:port`"));
        }
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag.to_owned())),
            None => (path, None),
        };
        let name_ok = !repository.is_empty()
            && repository.split('/').all(|part| {
                // `..` would be another repository to a server that resolves it (distribution-spec: parts begin and end so).
                let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
                ends(part.as_bytes().first())
                    && ends(part.as_bytes().last())
                    && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
            });
        if !name_ok {
            return Err(bad("the repository may have a-z, 0-9, `.`, `_`, `-` and `/`"));
        }
        let tag_ok = |tag: &String| {
            !tag.is_empty() && tag.len() <= 128 && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if tag.as_ref().is_some_and(|tag| !tag_ok(tag)) {
            return Err(bad("the tag may have letters, digits, `.`, `_` and `-`"));
        }
        if tag.is_none() && digest.is_none() {
            return Err(bad("it has neither a digest nor a tag"));
        }
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), tag, digest })
    }

    /// What a registry is asked for: the digest if there is one, else the tag.
    pub fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_default(),
        }
    }
}

/// RFC 3986, 3.2.
fn is_host_and_port(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    let is_name = |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && is_name(host),
    };
    is_host && port.is_none_or(is_port)
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_operators_write_them() {
        let digest = Digest::of(b"x");
        for text in [
            "registry.example/app:1.2".to_owned(),
            "10.0.2.2:5000/team/app:v1".to_owned(),
            format!("localhost:5000/app@{digest}"),
            format!("r.example/a/b:tag@{digest}"),
            "[::1]:5000/app:v1".to_owned(),
        ] {
            assert_eq!(Reference::parse(&text).unwrap().to_string(), text);
        }
        for bad in [
            "nginx",
            "library/nginx:1",
            "oci:-media/stick:v1",
            "oci:ple:50/media/stick:v1",
            "r.example:/app:1",
            "r.example:70000/app:1",
            "r.example/App:1",
            "r.example/app",
            "r.example//a:1",
            "r.example/a/../b:1",
            "r.example/a/.b:1",
            "r.example/a@sha256:1",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }
}

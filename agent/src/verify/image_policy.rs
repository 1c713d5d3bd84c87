//! Which signatures an image must have, by the signed rules of the trust root: the longest prefix of its name counts. What no
//! rule speaks of is left to the device's own configuration. Pure.

use edged_model::reason::{Code, Reason};
use edged_model::trust::{ImageRule, Require, RoleName, TrustRoot};

use super::cosign::Wanted;
use super::trust::{role_spki, spki};

/// What must hold for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Demand {
    /// That a signed manifest names its digest.
    Digest,
    Signature(Wanted),
}

/// A rule of the trust root with its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    prefix: String,
    pub demand: Demand,
}

/// The rules of a sound root.
pub fn rules(root: &TrustRoot) -> Vec<Rule> {
    root.images.iter().map(|rule| Rule { prefix: rule.prefix.clone(), demand: demand(root, rule) }).collect()
}

fn demand(root: &TrustRoot, rule: &ImageRule) -> Demand {
    if rule.require == Require::Digest {
        return Demand::Digest;
    }
    let role = root.roles.get(&RoleName::Image).map_or(1, |role| role.threshold);
    let (keys, threshold) = match rule.keys.is_empty() {
        true => (role_spki(root, RoleName::Image), role),
        false => (spki(root, &rule.keys), 1),
    };
    Demand::Signature(Wanted {
        keys,
        threshold: rule.threshold.unwrap_or(threshold) as usize,
        identity: rule.identity.clone(),
        annotations: rule.annotations.clone(),
    })
}

/// The rule for `image`: that of the longest prefix.
pub fn choose<'r>(rules: &'r [Rule], image: &str) -> Option<&'r Rule> {
    longest(rules.iter().map(|rule| (rule.prefix.as_str(), rule)), image)
}

/// Of what is said by prefix, what counts for `image`.
pub fn longest<'r, T>(all: impl Iterator<Item = (&'r str, T)>, image: &str) -> Option<T> {
    let name = repository(image);
    all.filter(|(prefix, _)| begins(name, prefix)).max_by_key(|(prefix, _)| prefix.len()).map(|(_, what)| what)
}

/// `registry.example:5000/team/app:1@sha256:…` is of the repository `registry.example:5000/team/app`; a layout on a stick
/// is of its path.
fn repository(image: &str) -> &str {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    // The tag, and neither the port of the registry nor the `oci:` before a path.
    match name.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') && before.contains('/') => before,
        _ => name,
    }
}

/// Whole parts only: `r.example/team` is no prefix of `r.example/teammate`.
fn begins(name: &str, prefix: &str) -> bool {
    let Some(rest) = name.strip_prefix(prefix) else { return false };
    rest.is_empty() || rest.starts_with('/') || prefix.is_empty() || prefix.ends_with(['/', ':'])
}

/// What cannot work in a root's rules.
pub fn sound(root: &TrustRoot) -> Result<(), Reason> {
    for (index, rule) in root.images.iter().enumerate() {
        let bad = |why: &str| {
            let text = format!("trust root: the image rule for `{}` {why}", rule.prefix);
            Err(Reason::new(Code::Malformed, text).next("correct the file for `--image-policy`"))
        };
        if rule.prefix.chars().any(|c| c.is_whitespace() || c.is_control() || c == '@') || rule.prefix.starts_with('/')
        {
            return bad("is not the beginning of an image's name");
        }
        if root.images[..index].iter().any(|other| other.prefix == rule.prefix) {
            return bad("is there twice");
        }
        if rule.keys.iter().any(|id| !root.keys.contains_key(id)) {
            return bad("names a key that is not there");
        }
        let is_plain = rule.keys.is_empty() && rule.threshold.is_none();
        if rule.require == Require::Digest && !(is_plain && rule.identity.is_none() && rule.annotations.is_empty()) {
            return bad("asks for no signature, and yet for what a signature must have");
        }
        if let Demand::Signature(Wanted { keys, threshold, .. }) = demand(root, rule) {
            let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
            if threshold == 0 || threshold > distinct.len() {
                return bad(&format!("asks for {threshold} signatures and has {} keys", distinct.len()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::id::Digest;
    use edged_model::trust::Role;

    fn root(images: Vec<ImageRule>) -> TrustRoot {
        let keys: Vec<Vec<u8>> = (0..3_u8).map(|n| vec![n]).collect();
        let ids: Vec<_> = keys.iter().map(|key| Digest::of(key)).collect();
        TrustRoot {
            version: 1,
            keys: keys.iter().map(|key| (Digest::of(key), hex::encode(key))).collect(),
            roles: RoleName::ALL.map(|name| (name, Role { keys: ids[..2].to_vec(), threshold: 2 })).into(),
            images,
            ..TrustRoot::none()
        }
    }

    fn rule(prefix: &str, require: Require) -> ImageRule {
        ImageRule { prefix: prefix.to_owned(), ..ImageRule::new(require) }
    }

    #[test]
    fn the_longest_prefix_of_whole_parts_counts() {
        let prefixes = ["", "r.example:5000", "r.example:5000/team", "r.example:5000/team/app", "oci:"];
        let rules = rules(&root(prefixes.map(|prefix| rule(prefix, Require::Digest)).into()));
        let chosen = |image: &str| choose(&rules, image).map(|rule| rule.prefix.as_str()).unwrap();
        assert_eq!(chosen("r.example:5000/team/app:1"), "r.example:5000/team/app");
        assert_eq!(chosen("r.example:5000/team/app@sha256:00"), "r.example:5000/team/app");
        assert_eq!(chosen("r.example:5000/team/apple:1@sha256:00"), "r.example:5000/team");
        assert_eq!(chosen("r.example:5000/teammate/app:1"), "r.example:5000");
        assert_eq!(chosen("r.example:50000/team/app:1"), "", "another port is another registry");
        assert_eq!(chosen("r.example/team/app:1"), "");
        assert_eq!(chosen("oci:/media/stick:v1"), "oci:");
        assert_eq!(choose(&rules[1..], "r.example/x:1"), None);
    }

    #[test]
    fn a_rule_without_keys_means_those_of_the_image_role() {
        let own = ImageRule { keys: vec![Digest::of(&[2])], ..rule("a", Require::Signature) };
        let root = root(vec![rule("", Require::Signature), own]);
        assert_eq!(sound(&root), Ok(()));
        let wanted = |image| match &choose(&rules(&root), image).unwrap().demand {
            Demand::Signature(wanted) => (wanted.keys.clone(), wanted.threshold),
            Demand::Digest => panic!("a digest"),
        };
        assert_eq!(wanted("b/x:1"), (vec![vec![0], vec![1]], 2));
        assert_eq!(wanted("a/x:1"), (vec![vec![2]], 1));
    }

    #[test]
    fn what_cannot_work_is_not_sound() {
        let code = |rule: ImageRule| sound(&root(vec![rule])).map_err(|why| why.code);
        let own = |ids: &[u8], threshold| ImageRule {
            keys: ids.iter().map(|n| Digest::of(&[*n])).collect(),
            threshold: Some(threshold),
            ..rule("a", Require::Signature)
        };
        assert_eq!(code(own(&[0, 1, 2], 3)), Ok(()));
        for bad in [
            own(&[0, 1], 3),
            own(&[0, 0], 2),
            own(&[0], 0),
            own(&[9], 1),
            rule("/a", Require::Digest),
            rule("a@sha256", Require::Digest),
            rule("a b", Require::Digest),
            ImageRule { keys: vec![Digest::of(&[0])], ..rule("a", Require::Digest) },
            ImageRule { identity: Some("a".to_owned()), ..rule("a", Require::Digest) },
        ] {
            assert_eq!(code(bad.clone()), Err(Code::Malformed), "{bad:?}");
        }
        assert!(sound(&root(vec![rule("a", Require::Digest), rule("a", Require::Signature)])).is_err());
    }
}

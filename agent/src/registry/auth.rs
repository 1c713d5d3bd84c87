//! What a registry wants for a log-in (distribution-spec "token authentication"; RFC 9110, 11).

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer { realm: String, service: String, scope: String },
}

impl Challenge {
    /// `Bearer realm="https://…",service="…",scope="…"` or `Basic realm="…"`.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, parameters) = text.split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let field = |name: &str| {
            let at = parameters.find(&format!("{name}=\""))? + name.len() + 2;
            parameters[at..].split('"').next().map(str::to_owned)
        };
        let realm = field("realm")?;
        Some(Self::Bearer {
            realm,
            service: field("service").unwrap_or_default(),
            scope: field("scope").unwrap_or_default(),
        })
    }
}

/// The token in a token service's answer.
pub fn token(json: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    let token = value.get("token").or_else(|| value.get("access_token"))?;
    token.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_challenge() {
        assert_eq!(Challenge::parse("Basic realm=\"r\""), Some(Challenge::Basic));
        let bearer = Challenge::parse("Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:x:pull\"");
        let expected = Challenge::Bearer {
            realm: "https://a/t".to_owned(),
            service: "s".to_owned(),
            scope: "repository:x:pull".to_owned(),
        };
        assert_eq!(bearer, Some(expected));
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(token("{\"access_token\":\"t\"}").as_deref(), Some("t"));
    }
}

//! The `Link` header (RFC 8288), as far as a list in parts needs it.

/// The target with the relation `next`.
pub fn next(header: &str) -> Option<&str> {
    let mut links = header.split('<').skip(1).filter_map(|link| link.split_once('>'));
    links.find(|(_, parameters)| parameters.split([';', ',']).any(is_next)).map(|(target, _)| target)
}

fn is_next(parameter: &str) -> bool {
    let Some((name, value)) = parameter.split_once('=') else { return false };
    let mut relations = value.trim().trim_matches('"').split_whitespace();
    name.trim().eq_ignore_ascii_case("rel") && relations.any(|relation| relation.eq_ignore_ascii_case("next"))
}

#[cfg(test)]
mod tests {
    use super::next;

    #[test]
    fn the_next_part_is_told_from_others() {
        assert_eq!(next(r#"</v2/a/referrers/d?n=1&last=x>; rel="next""#), Some("/v2/a/referrers/d?n=1&last=x"));
        assert_eq!(next("<a>;REL=Next"), Some("a"));
        assert_eq!(next(r#"<a>; rel="prev", <b>; title="rest"; rel="last next""#), Some("b"));
        for none in ["", "a; rel=next", "<a; rel=next", "<a>", r#"<a>; rel="prev""#, r#"<a>; title="next""#] {
            assert_eq!(next(none), None, "{none}");
        }
    }
}

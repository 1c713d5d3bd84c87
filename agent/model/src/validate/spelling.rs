//! "Did you mean": names that were misspelt, with the nearest known one.

/// The known name nearest to a misspelt one, if one is near: for "did you mean".
pub fn nearest<'k>(wrong: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wrong, name), name))
        .filter(|(distance, name)| *distance <= (name.len().max(3)) / 2)
        .min()
        .map(|(_, name)| name)
}

/// Whether serde's text says that a field is unknown.
pub(crate) fn is_unknown_field(error: &str) -> bool {
    error.starts_with("unknown field `")
}

/// Rewrites serde's "unknown field `x`, expected one of `a`, `b`" (or "unknown variant") into one that names the
/// nearest. The field itself is the end of the path that is told with it.
pub fn explain(error: &str) -> String {
    let (wrong, known, what) = if let Some((wrong, known)) = names(error, "unknown field `") {
        (wrong, known, "unknown field".to_owned())
    } else if let Some((wrong, known)) = names(error, "unknown variant `") {
        (wrong, known, format!("unknown value `{wrong}`"))
    } else {
        return error.to_owned();
    };
    match nearest(wrong, known.iter().copied()) {
        Some(name) => format!("{what}; did you mean `{name}`?"),
        None if known.is_empty() => what,
        None => format!("{what}; known are {}", known.join(", ")),
    }
}

/// The wrong name and the known ones in serde's text.
fn names<'t>(error: &'t str, start: &str) -> Option<(&'t str, Vec<&'t str>)> {
    let rest = error.strip_prefix(start)?;
    // The wrong name may hold anything; serde's own words follow it.
    let (wrong, rest) = ["`, expected", "`, there are no"].iter().find_map(|words| rest.rsplit_once(words))?;
    Some((wrong, rest.split('`').skip(1).step_by(2).collect()))
}

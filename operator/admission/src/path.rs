//! Field paths as Kubernetes writes them: `spec.nodePools[0].name`.

/// Text of a path that serde_ignored followed, below `base`.
pub fn of_ignored(base: &str, path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => base.to_owned(),
        Path::Seq { parent, index } => format!("{}[{index}]", of_ignored(base, parent)),
        Path::Map { parent, key } => field(&of_ignored(base, parent), key),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            of_ignored(base, parent)
        }
    }
}

/// Text of a path that serde_path_to_error followed, below `base`.
pub fn of_error(base: &str, path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter().fold(base.to_owned(), |parent, segment| match segment {
        Segment::Seq { index } => format!("{parent}[{index}]"),
        Segment::Map { key } => field(&parent, key),
        Segment::Enum { variant } => field(&parent, variant),
        Segment::Unknown => parent,
    })
}

/// `parent.key`, or `parent[key]` for a key with a dot in it, such as a label's.
pub fn field(parent: &str, key: &str) -> String {
    if parent.is_empty() {
        key.to_owned()
    } else if key.contains('.') || key.contains('/') {
        format!("{parent}[{key}]")
    } else {
        format!("{parent}.{key}")
    }
}

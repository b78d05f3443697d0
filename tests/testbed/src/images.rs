//! Brings images into the nodes' containerd: the bed's own (pause, CoreDNS) and any OCI archive.
//!
//! Every image is known by its tag and by its digest, so pods may ask for either. It deliberately talks to no registry.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use futures::future::try_join_all;

use crate::{
    components::{self, Components},
    config::{CONTAINERD_SOCKET, COREDNS_IMAGE, PAUSE_IMAGE},
    group,
    oci::{self, Entry, Image, Source},
    plan::{Group, Plan},
    run::{self, run},
};

/// Why an image could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive could not be made or read.
    #[error(transparent)]
    Archive(#[from] oci::Error),
    /// The cache could not be used.
    #[error(transparent)]
    Cache(#[from] components::Error),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The libraries of a program could not be listed.
    #[error("cannot list the libraries of {program}")]
    Libraries {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// containerd refused the image.
    #[error("node {node} does not take image {image}")]
    Import {
        /// The node.
        node: usize,
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// The node does not run.
    #[error(
        "node {node} is off, so image {image} cannot be loaded there: `kubernest-testbed node restore {node}` first"
    )]
    Off {
        /// The node.
        node: usize,
        /// The image.
        image: String,
    },
}

/// The programs of the image for tests: all of Debian's essential packages.
const BOX: &[&str] = &[
    "cat", "cp", "date", "dd", "echo", "env", "false", "grep", "head", "hostname", "id", "ls", "mkdir", "mv", "perl",
    "rm", "sed", "seq", "sh", "sleep", "sort", "stat", "sync", "tail", "test", "touch", "true", "uname", "wc",
];
/// The image for tests: a shell, a few of coreutils, and perl for sockets.
const BOX_IMAGE: &str = "localhost/testbed-box:1";

/// `serve <port> <text>`: answers every connection with the text and an HTTP head. Without modules, as perl-base's are
/// not in the image; 2 is AF_INET, 1 SOCK_STREAM and SOL_SOCKET, 2 SO_REUSEADDR (Linux, socket.h).
const SERVE: &str = r#"#!/bin/perl
my ($port, $text) = @ARGV;
my $s;
socket($s, 2, 1, 6) and setsockopt($s, 1, 2, pack("i", 1)) or die "socket: $!\n";
bind($s, pack("S n a4 x8", 2, $port, "\0" x 4)) and listen($s, 64) or die "port $port: $!\n";
$SIG{TERM} = sub { exit 0 };
$SIG{PIPE} = "IGNORE";
while (1) {
    accept(my $c, $s) or next;
    sysread($c, my $request, 4096);
    syswrite($c, "HTTP/1.0 200 OK\r\nContent-Length: " . (1 + length $text) . "\r\n\r\n$text\n");
    close $c;
}
"#;
/// `fetch <host> <port>`: prints the body of `GET /`, resolving the host by the pod's DNS; fails after 5 s.
const FETCH: &str = r#"#!/bin/perl
my ($host, $port) = @ARGV;
alarm 5;
$SIG{ALRM} = sub { die "$host:$port: no answer in 5 s\n" };
my @h = gethostbyname($host) or die "$host: no such name\n";
my $s;
socket($s, 2, 1, 6) and connect($s, pack("S n a4 x8", 2, $port, $h[4])) or die "$host:$port: $!\n";
syswrite($s, "GET / HTTP/1.0\r\nHost: $host\r\n\r\n");
local $/;
my (undef, $body) = split /\r\n\r\n/, <$s>, 2;
print $body;
"#;

/// The archives of the images that every bed needs, made when missing.
pub async fn own(components: &Components) -> Result<Vec<PathBuf>, Error> {
    let catatonit = components::which("catatonit").unwrap_or_default();
    let pause = oci::Config {
        name: PAUSE_IMAGE,
        entrypoint: &["/pause", "-P"],
        user: "65535:65535",
    };
    let coredns = oci::Config {
        name: COREDNS_IMAGE,
        entrypoint: &["/coredns"],
        user: "65532:65532",
    };
    Ok(vec![
        archive("pause", &pause, vec![(Source::File(catatonit), "/pause".into())]).await?,
        archive(
            "coredns",
            &coredns,
            vec![(Source::File(components.path("coredns", "coredns")), "/coredns".into())],
        )
        .await?,
    ])
}

/// The archive of a small image with this machine's shell, coreutils and perl, for pods of tests.
pub async fn testbox() -> Result<PathBuf, Error> {
    let programs: Vec<PathBuf> = BOX.iter().filter_map(|p| components::which(p)).collect();
    let mut files: Vec<Entry> = Vec::new();
    let mut libraries = HashSet::new();
    for program in &programs {
        let name = program.display().to_string();
        let listed = run(&["ldd", &name]).await.map_err(|source| Error::Libraries {
            program: name.clone(),
            source,
        })?;
        libraries.extend(
            listed
                .split_whitespace()
                .filter(|w| w.starts_with('/'))
                .map(PathBuf::from),
        );
        files.push((
            Source::File(program.clone()),
            format!("/bin/{}", program.file_name().unwrap_or_default().to_string_lossy()),
        ));
    }
    files.extend(
        libraries
            .into_iter()
            .map(|l| (Source::File(l.clone()), l.display().to_string())),
    );
    files.extend([
        (Source::Script(SERVE), "/bin/serve".into()),
        (Source::Script(FETCH), "/bin/fetch".into()),
    ]);
    files.sort();
    archive(
        "box",
        &oci::Config {
            name: BOX_IMAGE,
            entrypoint: &["/bin/sh"],
            user: "65534:65534",
        },
        files,
    )
    .await
}

/// Cached by what the files are: path, size and time of change.
async fn archive(name: &str, config: &oci::Config<'_>, files: Vec<Entry>) -> Result<PathBuf, Error> {
    use std::os::unix::fs::MetadataExt;
    let mut key = format!("{config:?}");
    for (from, into) in &files {
        let from = match from {
            Source::File(from) => from,
            Source::Script(text) => {
                key.push_str(&format!("{into} {text}\n"));
                continue;
            }
        };
        let meta = fs::metadata(from).map_err(|source| Error::Read {
            path: from.display().to_string(),
            source,
        })?;
        let real = fs::canonicalize(from).unwrap_or_default();
        key.push_str(&format!(
            "{real:?} {into} {} {}.{}\n",
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec()
        ));
    }
    use sha2::{Digest, Sha256};
    let key: String = Sha256::digest(&key)
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    let dir = components::cache_dir()?.join("testbed-images");
    fs::create_dir_all(&dir).map_err(|source| Error::Read {
        path: dir.display().to_string(),
        source,
    })?;
    let to = dir.join(format!("{name}-{key}.tar"));
    let scratch = dir.join(format!(".{name}-{}", std::process::id()));
    oci::make(&to, &scratch, config, &files).await?;
    Ok(to)
}

/// Loads an archive into every node that lacks it and returns how pods refer to it.
pub async fn load(plan: &Plan, components: &Components, archive: &Path) -> Result<String, Error> {
    let image = oci::inspect(archive).await?;
    try_join_all((0..plan.nodes()).map(|i| load_on(plan, components, i, archive, &image))).await?;
    Ok(image.digest_reference())
}

/// Loads an archive into one node unless it has it.
pub async fn load_on(
    plan: &Plan,
    components: &Components,
    node: usize,
    archive: &Path,
    image: &Image,
) -> Result<(), Error> {
    let off = || Error::Off {
        node,
        image: image.name.clone(),
    };
    let supervisor = group::supervisor(plan, Group::Node(node)).ok_or_else(off)?;
    let failed = |source| Error::Import {
        node,
        image: image.name.clone(),
        source,
    };
    let socket = format!("/proc/{supervisor}/root{CONTAINERD_SOCKET}");
    let ctr = components.path("containerd", "ctr").display().to_string();
    let images = [&ctr, "--address", &socket, "--namespace", "k8s.io", "images"];
    let list = [images.as_slice(), &["list"]].concat();
    if missing(&run(&list).await.map_err(failed)?, image).is_empty() {
        return Ok(());
    }
    let path = fs::canonicalize(archive)
        .unwrap_or_else(|_| archive.into())
        .display()
        .to_string();
    // An archive that names its image by a bare tag (or not at all) gets the name that `inspect` gave it.
    let base = image
        .name
        .rsplit_once(':')
        .map_or(image.name.as_str(), |(base, _)| base);
    let import = run(&[images.as_slice(), &["import", "--base-name", base, "--digests", &path]].concat()).await;
    import.map_err(failed)?;
    let listed = run(&list).await.map_err(failed)?;
    let imported = names(&listed, &image.digest)
        .first()
        .copied()
        .unwrap_or(&image.name)
        .to_owned();
    for name in missing(&listed, image) {
        run(&[images.as_slice(), &["tag", "--force", &imported, &name]].concat())
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// The names that containerd lists for a digest. (`ctr images list`: name, type, digest, …)
fn names<'a>(listed: &'a str, digest: &str) -> Vec<&'a str> {
    let rows = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.get(2) == Some(&digest))
        .filter_map(|row| row.first().copied())
        .collect()
}

/// By which of its two names, tag and digest, the image is not yet known.
fn missing(listed: &str, image: &Image) -> Vec<String> {
    let known = names(listed, &image.digest);
    [image.name.clone(), image.digest_reference()]
        .into_iter()
        .filter(|n| !known.contains(&n.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_an_image_is_loaded_once_both_names_are_known() {
        let image = Image {
            name: "localhost/x:1".into(),
            digest: "sha256:ab".into(),
        };
        let head = "REF TYPE DIGEST SIZE\nlocalhost/x:1 t sha256:ab 1\n";
        assert_eq!(missing(head, &image), ["localhost/x@sha256:ab"]);
        assert!(missing(&format!("{head}localhost/x@sha256:ab t sha256:ab 1\n"), &image).is_empty());
        assert_eq!(missing("localhost/x:1 t sha256:cd 1\n", &image).len(), 2);
    }
}

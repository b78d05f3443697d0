//! `/etc/resolv.conf` (resolv.conf(5)) → what a guest can use of it. Pure.

use std::net::Ipv4Addr;

/// Name servers kept: as many as glibc uses.
const MAX_SERVERS: usize = 3;
/// Search domains kept: Kubernetes' own limit.
const MAX_SEARCH: usize = 32;

/// IPv4 name servers that a guest reaches too (not the pod's loopback), and search domains of the last `search` line.
pub fn parse(text: &str) -> (Vec<Ipv4Addr>, Vec<String>) {
    let (mut servers, mut search) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => servers.extend(words.next().and_then(|word| word.parse::<Ipv4Addr>().ok())),
            Some("search" | "domain") => {
                search = words
                    .filter(|word| *word != ".")
                    .map(|word| word.trim_end_matches('.').to_owned())
                    .collect();
            }
            _ => {}
        }
    }
    servers.retain(|server| !server.is_loopback());
    servers.truncate(MAX_SERVERS);
    search.truncate(MAX_SEARCH);
    (servers, search)
}

#[cfg(test)]
mod tests {
    #[test]
    fn resolv_conf_of_a_pod() {
        let text = "search a.svc.cluster.local svc.cluster.local. .\nnameserver 10.96.0.10\nnameserver ::1\n\
                    nameserver 127.0.0.53\noptions ndots:5\n# nameserver 1.1.1.1\n";
        let (servers, search) = super::parse(text);
        assert_eq!(servers, [std::net::Ipv4Addr::new(10, 96, 0, 10)]);
        assert_eq!(search, ["a.svc.cluster.local", "svc.cluster.local"]);
        assert_eq!(super::parse(""), (vec![], vec![]));
    }
}

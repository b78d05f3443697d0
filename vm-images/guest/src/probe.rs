//! Asks an HTTPS address whether a stage is done, over one connection that is kept.
//!
//! No HTTP library: under emulation each TLS handshake costs the node more than the work it waits for, so the
//! connection is reused, and one GET is all that is ever sent.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kubernest_bootstrap::WaitFor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// For connecting and for each read; an emulated API server under load takes seconds for a handshake.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Largest answer that is read, in bytes; a full `/readyz` report has about 3 KiB.
const ANSWER_MAX: u64 = 64 << 10;

/// Why an address cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Not an https URL with a host.
    #[error("{url:?} is not an address like https://127.0.0.1:6443/readyz")]
    Url {
        /// What the document says.
        url: String,
    },
    /// A certificate or key cannot be read.
    #[error("cannot read {}", .path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// TLS refuses the CA or client certificate.
    #[error("cannot set up TLS for {url}")]
    Tls {
        /// For which address.
        url: String,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
}

/// What the address said.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// 200.
    Ready,
    /// Anything else, and no answer at all: why, in a few words.
    NotYet(String),
}

/// An address to be asked again and again.
pub struct Probe {
    target: Target,
    tls: Arc<ClientConfig>,
    connection: Option<BufReader<StreamOwned<ClientConnection, TcpStream>>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    authority: String,
    host: String,
    port: u16,
    path: String,
}

impl Probe {
    /// Reads certificates; nothing is sent yet.
    pub fn new(wait: &WaitFor) -> Result<Self, ProbeError> {
        let target = parse(&wait.url).ok_or_else(|| ProbeError::Url { url: wait.url.clone() })?;
        let tls_failed = |source| ProbeError::Tls {
            url: wait.url.clone(),
            source,
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&wait.ca_file)? {
            roots.add(certificate).map_err(tls_failed)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls_failed)?
            .with_root_certificates(roots);
        let tls = match &wait.client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let path = PathBuf::from(&client.key_file);
                let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| ProbeError::Pem { path, source })?;
                builder
                    .with_client_auth_cert(certificates(&client.cert_file)?, key)
                    .map_err(tls_failed)?
            }
        };
        Ok(Self {
            target,
            tls: Arc::new(tls),
            connection: None,
        })
    }

    /// Asks once.
    pub fn ask(&mut self) -> Answer {
        match self.exchange() {
            Ok((200, _)) => Answer::Ready,
            Ok((status, body)) => Answer::NotYet(format!("HTTP {status}: {}", summary(&body))),
            Err(error) => {
                self.connection = None;
                Answer::NotYet(crate::console::chain(&error))
            }
        }
    }

    fn exchange(&mut self) -> io::Result<(u16, String)> {
        let mut stream = match self.connection.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let Target { authority, path, .. } = &self.target;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: kubernest-guest\r\n\r\n");
        stream.get_mut().write_all(request.as_bytes())?;
        stream.get_mut().flush()?;
        let (status, body, keep) = receive(&mut stream)?;
        if keep {
            self.connection = Some(stream);
        }
        Ok((status, body))
    }

    fn connect(&self) -> io::Result<BufReader<StreamOwned<ClientConnection, TcpStream>>> {
        let Target { host, port, .. } = &self.target;
        let address = (host.as_str(), *port)
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address")))?;
        let socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        socket.set_nodelay(true)?;
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::clone(&self.tls), name).map_err(io::Error::other)?;
        Ok(BufReader::new(StreamOwned::new(session, socket)))
    }
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, ProbeError> {
    let path = PathBuf::from(path);
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    read.map_err(|source| ProbeError::Pem { path, source })
}

/// Splits `https://host[:port]/path`; IPv6 hosts stand in brackets.
fn parse(url: &str) -> Option<Target> {
    let rest = url.strip_prefix("https://")?;
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (authority, 443),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.is_empty() || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return None;
    }
    Some(Target {
        authority: authority.to_owned(),
        host: bare.to_owned(),
        port,
        path: path.to_owned(),
    })
}

/// Reads one answer: its status, its body, and whether the connection can serve again (RFC 9112).
fn receive(stream: &mut impl BufRead) -> io::Result<(u16, String, bool)> {
    let mut head = stream.take(ANSWER_MAX);
    let status = status(&line(&mut head)?)?;
    let mut length = None;
    let mut keep = true;
    loop {
        let text = line(&mut head)?;
        let Some((name, value)) = text.split_once(':') else {
            break;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse::<u64>().ok();
        } else if name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            keep = false;
        }
    }
    let mut body = Vec::new();
    match length.filter(|length| *length <= ANSWER_MAX) {
        Some(length) => drop(stream.take(length).read_to_end(&mut body)?),
        // Chunked or endless: what it says does not matter enough to read it.
        None => keep = false,
    }
    Ok((status, String::from_utf8_lossy(&body).into_owned(), keep))
}

fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    if stream.read_line(&mut text)? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the connection ended within an answer",
        ));
    }
    Ok(text.trim_end().to_owned())
}

fn status(line: &str) -> io::Result<u16> {
    let code = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|code| code.parse().ok());
    code.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

/// The checks that `/readyz` reports as failing, or else the first line.
fn summary(body: &str) -> String {
    let failing: Vec<&str> = body
        .lines()
        .filter_map(|line| line.strip_prefix("[-]"))
        .map(|line| line.split(' ').next().unwrap_or(line))
        .collect();
    if failing.is_empty() {
        body.lines().next().unwrap_or_default().to_owned()
    } else {
        failing.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn probe_parses_addresses() {
        let target = parse("https://127.0.0.1:6443/readyz?verbose").unwrap();
        assert_eq!(
            (target.host.as_str(), target.port, target.path.as_str()),
            ("127.0.0.1", 6443, "/readyz?verbose")
        );
        assert_eq!(parse("https://[::1]:6443/").unwrap().host, "::1");
        assert_eq!(parse("https://api").unwrap().port, 443);
        assert!(parse("http://127.0.0.1/").is_none());
        assert!(parse("https://a/b\r\nEvil: 1").is_none());
    }

    #[test]
    fn probe_receives_answers_of_all_shapes() {
        let mut text = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP".as_bytes();
        assert_eq!(receive(&mut text).unwrap(), (200, "ok".to_owned(), true));
        assert_eq!(text, b"HTTP");
        let mut text = "HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok".as_bytes();
        assert_eq!(receive(&mut text).unwrap(), (500, String::new(), false));
        assert!(receive(&mut "SSH-2.0-x\r\n".as_bytes()).is_err());
        assert!(receive(&mut "HTTP/1.1 200 OK\r\nA: b\r\n".as_bytes()).is_err());
    }

    #[test]
    fn probe_summary_names_the_failing_checks() {
        assert_eq!(
            summary("[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed"),
            "etcd"
        );
        assert_eq!(summary("not found\n"), "not found");
    }

    #[test]
    fn probe_keeps_its_connection_until_ready() {
        let issued = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ca_file = folder.path().join("ca.pem");
        std::fs::write(&ca_file, issued.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![issued.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let session = rustls::ServerConnection::new(Arc::new(server)).unwrap();
            let mut stream = BufReader::new(StreamOwned::new(session, socket));
            for answer in [
                "HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n[-]etcd x",
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            ] {
                while line(&mut stream).unwrap() != "" {}
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
                stream.get_mut().flush().unwrap();
            }
        });
        let ca_file = ca_file.to_str().unwrap().to_owned();
        let wait = WaitFor {
            url: format!("https://127.0.0.1:{port}/readyz"),
            ca_file,
            client: None,
        };
        let mut probe = Probe::new(&wait).unwrap();
        assert_eq!(probe.ask(), Answer::NotYet("HTTP 500: etcd".to_owned()));
        assert_eq!(probe.ask(), Answer::Ready);
        serving.join().unwrap();
    }
}

//! A client of the control port: certificates, commands, streams. Blocking, and with HTTP/1.1 written by hand, so that
//! a test sees each byte.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kubernest_domain::control;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

use super::pod::LIMIT;

/// The CA of launchers and of their client.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// A certificate and its key, PEM.
pub struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, certificate }
    }

    pub fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        Identity {
            certificate: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    /// The one client that launchers serve.
    pub fn api(&self) -> Identity {
        self.issue(control::CLIENT_NAME, ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// Writes what the launcher of this uid reads, as its Secret does.
    pub fn equip(&self, folder: &Path, uid: &str) {
        let server = self.issue(&control::server_name(uid), ExtendedKeyUsagePurpose::ServerAuth);
        fs::create_dir_all(folder).unwrap();
        for (file, content) in [
            (control::files::CERTIFICATE, &server.certificate),
            (control::files::KEY, &server.key),
            (control::files::CA, &self.certificate),
        ] {
            fs::write(folder.join(file), content).unwrap();
        }
    }

    /// A client that believes this authority, and shows an identity if it has one.
    pub fn client(
        &self,
        identity: Option<&Identity>,
        uid: &str,
        dial: impl Fn() -> io::Result<TcpStream> + 'static,
    ) -> Client {
        self.client_of(&[&TLS13, &TLS12], identity, uid, dial)
    }

    /// The same, of some versions of TLS.
    pub fn client_of(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        identity: Option<&Identity>,
        uid: &str,
        dial: impl Fn() -> io::Result<TcpStream> + 'static,
    ) -> Client {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        roots.add(ca).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            None => config.with_no_client_auth(),
            Some(Identity { certificate, key }) => config
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        Client {
            config: Arc::new(config),
            name: control::server_name(uid).try_into().unwrap(),
            dial: Box::new(dial),
        }
    }
}

/// Opens a connection a request.
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    dial: Box<dyn Fn() -> io::Result<TcpStream>>,
}

/// Status code and body.
pub type Answer = (u16, String);

impl Client {
    pub fn put(&self, path: &str) -> Answer {
        self.answer(&format!("PUT {path}"), "Content-Length: 0")
    }

    pub fn get(&self, path: &str) -> Answer {
        self.answer(&format!("GET {path}"), "Accept: */*")
    }

    /// Head, in small letters, and body of an answer that must be 200.
    pub fn download(&self, path: &str) -> (String, Vec<u8>) {
        let (head, mut stream) = self.exchange(&format!("GET {path}"), "Accept: */*").unwrap();
        assert_eq!(status(&head), 200, "{head}");
        let body = stream.bytes(&head);
        (head.to_ascii_lowercase(), body)
    }

    /// Nobody speaks HTTP with this client: it is cut off before a byte of an answer.
    pub fn is_refused(&self) -> bool {
        self.exchange("PUT /v1/unpause", "Content-Length: 0").is_err()
    }

    /// A stream, or the answer that it is refused with.
    pub fn open(&self, path: &str) -> Result<Stream, Answer> {
        let headers = format!("Connection: Upgrade\r\nUpgrade: {}", control::STREAM_PROTOCOL);
        let (head, mut stream) = self.exchange(&format!("GET {path}"), &headers).unwrap();
        match status(&head) {
            101 => {
                let protocol = format!("upgrade: {}", control::STREAM_PROTOCOL);
                assert!(head.to_ascii_lowercase().contains(&protocol), "{head}");
                Ok(stream)
            }
            other => Err((other, stream.body(&head))),
        }
    }

    fn answer(&self, request: &str, header: &str) -> Answer {
        let (head, mut stream) = self.exchange(request, header).unwrap();
        (status(&head), stream.body(&head))
    }

    /// The answer's head and what follows it.
    fn exchange(&self, request: &str, headers: &str) -> io::Result<(String, Stream)> {
        let tcp = (self.dial)()?;
        tcp.set_read_timeout(Some(LIMIT))?;
        let connection = ClientConnection::new(Arc::clone(&self.config), self.name.clone()).unwrap();
        let mut stream = Stream {
            tls: StreamOwned::new(connection, tcp),
            heard: Vec::new(),
        };
        write!(stream.tls, "{request} HTTP/1.1\r\nHost: launcher\r\n{headers}\r\n\r\n")?;
        stream.tls.flush()?;
        let end = b"\r\n\r\n";
        loop {
            if let Some(at) = stream.heard.windows(end.len()).position(|window| window == end) {
                let rest = stream.heard.split_off(at + end.len());
                let head = String::from_utf8(std::mem::replace(&mut stream.heard, rest)).unwrap();
                return Ok((head, stream));
            }
            if stream.hear()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// What follows an answer's head.
pub struct Stream {
    tls: StreamOwned<ClientConnection, TcpStream>,
    heard: Vec<u8>,
}

impl Stream {
    pub fn say(&mut self, text: &str) {
        self.tls.write_all(text.as_bytes()).unwrap();
        self.tls.flush().unwrap();
    }

    /// The same; false when the other side takes no more.
    pub fn try_say(&mut self, text: &str) -> bool {
        self.tls.sock.set_nonblocking(true).unwrap();
        let said = self.tls.write_all(text.as_bytes()).and_then(|()| self.tls.flush());
        self.tls.sock.set_nonblocking(false).unwrap();
        said.is_ok()
    }

    /// Waits for a text, and forgets all up to its end.
    pub fn until(&mut self, text: &str) {
        loop {
            let found = self
                .heard
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.heard.drain(..at + text.len());
                return;
            }
            let heard = self.hear();
            assert!(
                matches!(heard, Ok(1..)),
                "no {text:?} but {heard:?} after {}",
                String::from_utf8_lossy(&self.heard)
            );
        }
    }

    /// Nothing comes for this long.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.tls.sock.set_read_timeout(Some(time)).unwrap();
        let heard = self.hear();
        self.tls.sock.set_read_timeout(Some(LIMIT)).unwrap();
        heard.is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// Waits for the other side's goodbye.
    pub fn ends(&mut self) {
        loop {
            match self.hear() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => panic!("{error} after {}", String::from_utf8_lossy(&self.heard)),
            }
        }
    }

    fn body(&mut self, head: &str) -> String {
        String::from_utf8(self.bytes(head)).unwrap()
    }

    fn bytes(&mut self, head: &str) -> Vec<u8> {
        let head = head.to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        while self.heard.len() < length {
            assert_ne!(self.hear().unwrap(), 0, "{head}");
        }
        self.heard[..length].to_vec()
    }

    fn hear(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let n = self.tls.read(&mut buffer)?;
        self.heard.extend_from_slice(&buffer[..n]);
        Ok(n)
    }
}

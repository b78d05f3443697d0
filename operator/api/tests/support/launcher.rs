//! Servers in the place of launchers: with a launcher's genuine certificate, and a behaviour of the test's choice.

use std::{
    future::Future,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, Client, api::PostParams};
use kubernest_domain::{control, paths};
use kubernest_pki::{CaMaterial, EmbeddedIssuer, Leaf, San, issue};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// The CA of launchers, whose client's credential kubernest-api has.
pub struct Authority(EmbeddedIssuer);

impl Authority {
    /// Makes the Secret that the operator makes.
    pub async fn install(client: &Client) -> Self {
        let issuer = EmbeddedIssuer::new(&CaMaterial::generate("launchers").unwrap()).unwrap();
        let mut leaf = Leaf::client(control::CLIENT_NAME, None);
        leaf.sans = vec![San::Dns(control::CLIENT_NAME.to_owned())];
        let credential = issue(&issuer, &leaf).await.unwrap();
        let data = [
            (control::files::CERTIFICATE, credential.chain_pem.clone()),
            (control::files::KEY, credential.key_pem.to_string()),
            (control::files::CA, issuer.certificate_pem().to_owned()),
        ];
        let mut secret = Secret::default();
        secret.metadata.name = Some("kubernest-launcher-client".to_owned());
        secret.data = Some(
            data.map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes())))
                .into(),
        );
        let secrets: Api<Secret> = Api::namespaced(client.clone(), "kubernest-system");
        secrets.create(&PostParams::default(), &secret).await.unwrap();
        Self(issuer)
    }

    /// What the launcher of this uid shows.
    pub async fn acceptor(&self, uid: &str) -> TlsAcceptor {
        let name = control::server_name(uid);
        let leaf = Leaf::server(&name, vec![San::Dns(name.clone())]);
        let credential = issue(&self.0, &leaf).await.unwrap();
        let chain = CertificateDer::pem_slice_iter(credential.chain_pem.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(credential.key_pem.as_bytes()).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain.collect::<Result<_, _>>().unwrap(), key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A connection of kubernest-api's, and its request's head.
pub type Asked = TlsStream<TcpStream>;

/// A launcher at an address of its own.
pub struct Launcher {
    pub address: IpAddr,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    seen: AtomicU64,
}

impl Launcher {
    /// Answers each request of the instance `uid`'s with `behave`, which has the connection and the request's head.
    pub async fn start<F, B>(authority: &Authority, address: [u8; 4], uid: &str, behave: B) -> Self
    where
        B: Fn(Asked, String) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        let acceptor = authority.acceptor(uid).await;
        Self::start_raw(address, move |stream| {
            let (acceptor, behave) = (acceptor.clone(), behave.clone());
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                behave(stream, String::from_utf8(head).unwrap()).await;
            }
        })
        .await
    }

    /// The same before anything of TLS.
    pub async fn start_raw<F, B>(address: [u8; 4], behave: B) -> Self
    where
        B: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let address = IpAddr::from(address);
        let listener = TcpListener::bind((address, paths::CONTROL_PORT)).await.unwrap();
        let counts = Arc::new(Counts::default());
        let launcher = Self {
            address,
            counts: Arc::clone(&counts),
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counts.open.fetch_add(1, Ordering::SeqCst);
                counts.seen.fetch_add(1, Ordering::SeqCst);
                let (counts, behaving) = (Arc::clone(&counts), behave(stream));
                tokio::spawn(async move {
                    behaving.await;
                    counts.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        launcher
    }

    /// Connections that are still open.
    pub fn open(&self) -> usize {
        self.counts.open.load(Ordering::SeqCst)
    }

    /// Connections that there were.
    pub fn seen(&self) -> u64 {
        self.counts.seen.load(Ordering::SeqCst)
    }
}

/// Writes `piece` until nobody takes it any more.
pub async fn flood(stream: &mut (impl AsyncWriteExt + Unpin), piece: &[u8]) {
    while stream.write_all(piece).await.is_ok() {}
}

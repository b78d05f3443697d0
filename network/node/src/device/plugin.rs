//! One resource at the kubelet: a gRPC server on a socket beside the kubelet's, and its registration, renewed whenever the
//! kubelet starts anew (it then removes all sockets of plugins and makes its own).
//!
//! Service and client are written on tonic's base, as a generated one would need protoc to build.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{FutureExt as _, StreamExt as _};
use inotify::{EventMask, Inotify, WatchMask};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::api::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, DevicePluginOptions, DeviceSpec, Empty,
    ListAndWatchResponse, RegisterRequest,
};
use super::{COUNT, KVM};

/// The kubelet's socket in the folder.
const KUBELET: &str = "kubelet.sock";
/// Version of the interface.
const VERSION: &str = "v1beta1";
/// How long a registration may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A kubelet that made its socket but does not answer yet is asked again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The folder cannot be watched.
    #[error("watch {0}: mount the kubelet's device-plugins folder there")]
    Watch(PathBuf, #[source] io::Error),
    /// No socket.
    #[error("listen on {0}")]
    Listen(PathBuf, #[source] io::Error),
    /// The kubelet cannot be reached.
    #[error("reach the kubelet at {0}")]
    Connect(PathBuf, #[source] tonic::transport::Error),
    /// The kubelet said no.
    #[error("register {0} with the kubelet")]
    Register(&'static str, #[source] Box<Status>),
}

/// A resource to offer.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// Name of the resource.
    pub resource: &'static str,
    /// Path of the device node in the pod.
    pub container_path: &'static str,
    /// Our device node, as the container runtime sees it.
    pub host_path: PathBuf,
}

impl Plugin {
    fn socket_name(&self) -> &'static str {
        if self.resource == KVM {
            "kubernest-kvm.sock"
        } else {
            "kubernest-tun.sock"
        }
    }

    /// Offers the resource for good; `registered` is called each time that the kubelet knows of it.
    ///
    /// # Errors
    /// When folder or socket cannot be used. A kubelet that is away is waited for.
    pub async fn run(&self, folder: &Path, registered: impl Fn()) -> Result<(), PluginError> {
        let failed = |source| PluginError::Watch(folder.to_owned(), source);
        // Watched before anything is looked at, so that nothing happens unseen.
        let inotify = Inotify::init().map_err(failed)?;
        inotify
            .watches()
            .add(folder, WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::DELETE)
            .map_err(failed)?;
        let mut events = inotify.into_event_stream([0; 4096]).map_err(failed)?;
        loop {
            // Dropped at the end of this turn: the server stops taking calls and its lists end.
            let (_running, stopped) = watch::channel(());
            tokio::spawn(self.clone().serve(self.listen(folder)?, stopped));
            let known = match self.register(folder).await {
                Ok(()) => {
                    tracing::info!(resource = self.resource, "registered with the kubelet");
                    registered();
                    true
                }
                Err(error) => {
                    tracing::info!(
                        resource = self.resource,
                        error = &error as &dyn std::error::Error,
                        "not registered with the kubelet yet"
                    );
                    false
                }
            };
            loop {
                let event = if known {
                    events.next().await
                } else {
                    match tokio::time::timeout(AGAIN, events.next()).await {
                        Ok(event) => event,
                        Err(_) => break,
                    }
                };
                let event = event
                    .unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
                    .map_err(failed)?;
                let name = event.name.as_deref().and_then(|name| name.to_str()).unwrap_or_default();
                let kubelet_came = name == KUBELET && !event.mask.contains(EventMask::DELETE);
                let we_went = name == self.socket_name() && event.mask.contains(EventMask::DELETE);
                if kubelet_came || (we_went && !folder.join(name).exists()) {
                    break;
                }
            }
        }
    }

    fn listen(&self, folder: &Path) -> Result<UnixListener, PluginError> {
        let path = folder.join(self.socket_name());
        let listen = || {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            UnixListener::bind(&path)
        };
        listen().map_err(|source| PluginError::Listen(path.clone(), source))
    }

    async fn register(&self, folder: &Path) -> Result<(), PluginError> {
        let path = folder.join(KUBELET);
        let connect = |source| PluginError::Connect(path.clone(), source);
        let endpoint = Endpoint::from_shared(format!("unix:{}", path.display())).map_err(connect)?;
        let channel: Channel = endpoint.timeout(PATIENCE).connect().await.map_err(connect)?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.map_err(connect)?;
        let request = RegisterRequest {
            version: VERSION.into(),
            endpoint: self.socket_name().into(),
            resource_name: self.resource.into(),
            options: Some(DevicePluginOptions::default()),
        };
        let method = http::uri::PathAndQuery::from_static("/v1beta1.Registration/Register");
        let codec = ProstCodec::<RegisterRequest, Empty>::default();
        let answer = client.unary(Request::new(request), method, codec).await;
        answer
            .map(drop)
            .map_err(|status| PluginError::Register(self.resource, Box::new(status)))
    }

    async fn serve(self, listener: UnixListener, stopped: watch::Receiver<()>) {
        let mut stop = stopped.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (plugin, stopped) = (self.clone(), stopped.clone());
            async move { Ok::<_, Infallible>(plugin.answer(request, stopped).await) }
        });
        let incoming = UnixListenerStream::new(listener);
        let until = async move { drop(stop.changed().await) };
        if let Err(error) = Server::builder()
            .serve_with_incoming_shutdown(service, incoming, until)
            .await
        {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the device plugin's server ended"
            );
        }
    }

    async fn answer(self, request: http::Request<Body>, stopped: watch::Receiver<()>) -> http::Response<Body> {
        match request.uri().path() {
            "/v1beta1.DevicePlugin/GetDevicePluginOptions" => {
                let options = |_: Request<Empty>| async { Ok(Response::new(DevicePluginOptions::default())) };
                Grpc::new(ProstCodec::default())
                    .unary(tower::service_fn(options), request)
                    .await
            }
            "/v1beta1.DevicePlugin/ListAndWatch" => {
                // The list never changes; the stream stays open because its end means that the plugin is gone.
                let list = |_: Request<Empty>| {
                    let mut stopped = stopped.clone();
                    let end = async move { drop(stopped.changed().await) };
                    let forever = stream::once(futures::future::ok(devices())).chain(stream::pending());
                    let devices: BoxStream<'static, Result<ListAndWatchResponse, Status>> =
                        forever.take_until(end.boxed()).boxed();
                    futures::future::ok(Response::new(devices))
                };
                let codec = ProstCodec::<ListAndWatchResponse, Empty>::default();
                Grpc::new(codec)
                    .server_streaming(tower::service_fn(list), request)
                    .await
            }
            "/v1beta1.DevicePlugin/Allocate" => {
                let allocate = |request: Request<AllocateRequest>| {
                    let response = self.allocate(request.get_ref());
                    async { Ok(Response::new(response)) }.boxed()
                };
                Grpc::new(ProstCodec::default())
                    .unary(tower::service_fn(allocate), request)
                    .await
            }
            other => Status::unimplemented(format!("{other} is not offered in the plugin's options")).into_http(),
        }
    }

    /// The same for every device: they are rights to one device node.
    fn allocate(&self, request: &AllocateRequest) -> AllocateResponse {
        let spec = DeviceSpec {
            container_path: self.container_path.into(),
            host_path: self.host_path.display().to_string(),
            permissions: "rw".into(),
        };
        let container = |_| ContainerAllocateResponse {
            devices: vec![spec.clone()],
        };
        AllocateResponse {
            container_responses: request.container_requests.iter().map(container).collect(),
        }
    }
}

fn devices() -> ListAndWatchResponse {
    let device = |number| Device {
        id: format!("{number}"),
        health: "Healthy".into(),
    };
    ListAndWatchResponse {
        devices: (0..COUNT).map(device).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc;

    use super::super::TUN;
    use super::super::api::ContainerAllocateRequest;
    use super::*;

    /// The kubelet's side: takes registrations and then speaks with the plugin.
    async fn kubelet(folder: &Path) -> (tokio::task::JoinHandle<()>, mpsc::Receiver<RegisterRequest>) {
        let listener = UnixListener::bind(folder.join(KUBELET)).unwrap();
        let (to, requests) = mpsc::channel(9);
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let to = to.clone();
            async move {
                assert_eq!(request.uri().path(), "/v1beta1.Registration/Register");
                let register = move |request: Request<RegisterRequest>| {
                    let to = to.clone();
                    async move {
                        to.send(request.into_inner()).await.unwrap();
                        Ok(Response::new(Empty {}))
                    }
                };
                let mut grpc = Grpc::new(ProstCodec::default());
                Ok::<_, Infallible>(grpc.unary(tower::service_fn(register), request).await)
            }
        });
        let server = Server::builder().serve_with_incoming(service, UnixListenerStream::new(listener));
        (tokio::spawn(async { server.await.unwrap() }), requests)
    }

    #[tokio::test]
    async fn device_plugin_registers_lists_allocates_and_registers_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let plugin = Plugin {
            resource: TUN,
            container_path: "/dev/net/tun",
            host_path: "/run/x/tun".into(),
        };
        let times = Arc::new(AtomicUsize::new(0));
        let counted = times.clone();
        // The plugin starts before the kubelet does.
        let running = tokio::spawn(async move {
            plugin
                .run(&path, || {
                    counted.fetch_add(1, Ordering::Relaxed);
                })
                .await
                .unwrap();
        });
        let (server, mut requests) = kubelet(folder.path()).await;
        let request = requests.recv().await.unwrap();
        assert_eq!(
            (request.version.as_str(), request.resource_name.as_str()),
            ("v1beta1", TUN)
        );

        let endpoint = format!("unix:{}", folder.path().join(request.endpoint).display());
        let channel = Endpoint::from_shared(endpoint).unwrap().connect().await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let method = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/ListAndWatch");
        let codec = ProstCodec::<Empty, ListAndWatchResponse>::default();
        let mut list = client
            .server_streaming(Request::new(Empty {}), method, codec)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(list.message().await.unwrap().unwrap().devices.len(), COUNT);

        client.ready().await.unwrap();
        let method = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/Allocate");
        let wanted = ContainerAllocateRequest {
            devices_ids: vec!["7".into()],
        };
        let request = AllocateRequest {
            container_requests: vec![wanted],
        };
        let codec = ProstCodec::<AllocateRequest, AllocateResponse>::default();
        let answer = client
            .unary(Request::new(request), method, codec)
            .await
            .unwrap()
            .into_inner();
        let spec = &answer.container_responses[0].devices[0];
        assert_eq!(
            (spec.container_path.as_str(), spec.host_path.as_str()),
            ("/dev/net/tun", "/run/x/tun")
        );

        client.ready().await.unwrap();
        let method = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/PreStartContainer");
        let refused = client
            .unary(Request::new(Empty {}), method, ProstCodec::<Empty, Empty>::default())
            .await;
        assert_eq!(refused.unwrap_err().code(), tonic::Code::Unimplemented);

        // A kubelet that starts anew removes all sockets first.
        server.abort();
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let (_server, mut requests) = kubelet(folder.path()).await;
        assert_eq!(requests.recv().await.unwrap().resource_name, TUN);
        assert!(folder.path().join("kubernest-tun.sock").exists());
        let end = tokio::time::timeout(PATIENCE, list.message()).await.unwrap();
        assert!(end.is_err() || end.unwrap().is_none(), "the old list ends");
        running.abort();
        assert!(times.load(Ordering::Relaxed) >= 1);
    }
}

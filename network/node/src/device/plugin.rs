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
        let watch = |source| PluginError::Watch(folder.to_owned(), source);
        // Watched before anything is looked at, so that nothing happens unseen.
        let inotify = Inotify::init().map_err(watch)?;
        inotify
            .watches()
            .add(folder, WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::DELETE)
            .map_err(watch)?;
        let mut events = inotify.into_event_stream([0; 4096]).map_err(watch)?;
        loop {
            let server = tokio::spawn(self.clone().serve(self.listen(folder)?));
            let stop = server.abort_handle();
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
                    .map_err(watch)?;
                let name = event.name.as_deref().and_then(|name| name.to_str()).unwrap_or_default();
                let kubelet_came = name == KUBELET && !event.mask.contains(EventMask::DELETE);
                let we_went = name == self.socket_name() && event.mask.contains(EventMask::DELETE);
                if kubelet_came || (we_went && !folder.join(name).exists()) {
                    break;
                }
            }
            stop.abort();
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

    async fn serve(self, listener: UnixListener) {
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let plugin = self.clone();
            async move { Ok::<_, Infallible>(plugin.answer(request).await) }
        });
        if let Err(error) = Server::builder()
            .serve_with_incoming(service, UnixListenerStream::new(listener))
            .await
        {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the device plugin's server ended"
            );
        }
    }

    async fn answer(self, request: http::Request<Body>) -> http::Response<Body> {
        match request.uri().path() {
            "/v1beta1.DevicePlugin/GetDevicePluginOptions" => {
                let options = |_: Request<Empty>| async { Ok(Response::new(DevicePluginOptions::default())) };
                Grpc::new(ProstCodec::default())
                    .unary(tower::service_fn(options), request)
                    .await
            }
            "/v1beta1.DevicePlugin/ListAndWatch" => {
                // The list never changes; the stream stays open because its end means that the plugin is gone.
                let list = |_: Request<Empty>| async {
                    let devices: BoxStream<'static, Result<ListAndWatchResponse, Status>> =
                        stream::once(futures::future::ok(devices()))
                            .chain(stream::pending())
                            .boxed();
                    Ok(Response::new(devices))
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

//! Whether this node's kubelet gives processors to one container alone (CPU manager policy `static`).
//!
//! Asked of the kubelet's own PodResources API (k8s.io/kubelet/pkg/apis/podresources/v1/api.proto), whose socket lies in a
//! folder of its own: the kubelet's state file lies beside all pods' Secrets, and its configuration is served to those
//! only who may read every node's. With any other policy no processor can be had, and the list is empty.

use std::path::Path;
use std::time::Duration;

use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// Where the kubelet answers, below its `--root-dir`.
pub const SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// Nobody listens.
    #[error("cannot reach the kubelet at {0}")]
    Connect(String, #[source] tonic::transport::Error),
    /// The kubelet does not say.
    #[error("the kubelet does not say which processors it can give away")]
    Ask(#[source] Box<tonic::Status>),
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct AllocatableResourcesRequest {}

/// What containers can have alone, whether they have it or not. Devices and memory (tags 1 and 3) are skipped.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AllocatableResourcesResponse {
    /// Numbers of processors.
    #[prost(int64, repeated, tag = "2")]
    pub cpu_ids: Vec<i64>,
}

/// Whether the kubelet at `socket` has processors to give away.
///
/// # Errors
/// When it does not answer.
pub async fn gives_processors_away(socket: &Path) -> Result<bool, KubeletError> {
    let uri = format!("unix:{}", socket.display());
    let failed = |source| KubeletError::Connect(socket.display().to_string(), source);
    let endpoint = Endpoint::from_shared(uri).map_err(failed)?;
    let channel: Channel = endpoint.timeout(PATIENCE).connect().await.map_err(failed)?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(failed)?;
    let method = http::uri::PathAndQuery::from_static("/v1.PodResourcesLister/GetAllocatableResources");
    let codec = ProstCodec::<AllocatableResourcesRequest, AllocatableResourcesResponse>::default();
    let answer = client
        .unary(Request::new(AllocatableResourcesRequest {}), method, codec)
        .await;
    let answer = answer.map_err(|status| KubeletError::Ask(Box::new(status)))?;
    Ok(!answer.into_inner().cpu_ids.is_empty())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use prost::Message as _;
    use tokio::net::UnixListener;
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::body::Body;
    use tonic::server::Grpc;
    use tonic::transport::Server;
    use tonic::{Response, Status};

    use super::*;

    #[test]
    fn kubelet_message_is_read_as_the_kubelet_writes_it() {
        let read = |bytes: &'static [u8]| AllocatableResourcesResponse::decode(bytes).unwrap().cpu_ids;
        // What kubelet v1.35.4 answered on two processors, one of them reserved, and without the policy.
        assert_eq!(read(b"\x12\x01\x01"), [1]);
        assert_eq!(read(b""), [0_i64; 0]);
        // A device that is skipped, by hand after the protobuf encoding guide.
        assert_eq!(read(b"\x0a\x03\x0a\x01d\x12\x02\x01\x03"), [1, 3]);
    }

    /// The kubelet's side; it does not know the method if it has no answer.
    fn kubelet(socket: &Path, answer: Option<&'static [i64]>) {
        let listener = UnixListener::bind(socket).unwrap();
        let service = tower::service_fn(move |request: http::Request<Body>| async move {
            assert_eq!(request.uri().path(), "/v1.PodResourcesLister/GetAllocatableResources");
            let answer = move |_: Request<AllocatableResourcesRequest>| async move {
                let cpu_ids = answer.ok_or_else(|| Status::unimplemented("an old kubelet"))?.to_vec();
                Ok(Response::new(AllocatableResourcesResponse { cpu_ids }))
            };
            let mut grpc = Grpc::new(ProstCodec::default());
            Ok::<_, Infallible>(grpc.unary(tower::service_fn(answer), request).await)
        });
        let server = Server::builder().serve_with_incoming(service, UnixListenerStream::new(listener));
        tokio::spawn(async { server.await.unwrap() });
    }

    #[tokio::test]
    async fn kubelet_gives_processors_away_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        kubelet(&at("static"), Some(&[1]));
        kubelet(&at("none"), Some(&[]));
        kubelet(&at("old"), None);
        assert!(gives_processors_away(&at("static")).await.unwrap());
        assert!(!gives_processors_away(&at("none")).await.unwrap());
        let old = gives_processors_away(&at("old")).await;
        assert!(matches!(old, Err(KubeletError::Ask(_))), "{old:?}");
        let away = gives_processors_away(&at("away")).await;
        assert!(matches!(away, Err(KubeletError::Connect(..))), "{away:?}");
    }
}

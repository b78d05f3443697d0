//! Messages of the kubelet's device plugin interface v1beta1
//! (k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto), as far as they are used here. Unknown fields are skipped, as
//! protobuf wants it.

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// What a plugin can do beyond the least. Ours: nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct DevicePluginOptions {
    /// Whether `PreStartContainer` is to be called.
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    /// Whether `GetPreferredAllocation` may be called.
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

/// Plugin to kubelet: here I am.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RegisterRequest {
    /// `v1beta1`.
    #[prost(string, tag = "1")]
    pub version: String,
    /// Name of the plugin's socket in the folder of the kubelet's.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// Name of the extended resource.
    #[prost(string, tag = "3")]
    pub resource_name: String,
    /// See there.
    #[prost(message, optional, tag = "4")]
    pub options: Option<DevicePluginOptions>,
}

/// All devices of a plugin.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListAndWatchResponse {
    /// All, each time.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// One device.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Device {
    /// Unique in the plugin.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `Healthy` or `Unhealthy`.
    #[prost(string, tag = "2")]
    pub health: String,
}

/// Kubelet to plugin: a pod is to get devices.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AllocateRequest {
    /// One a container.
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerAllocateRequest>,
}

/// The devices of one container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContainerAllocateRequest {
    /// Their ids.
    #[prost(string, repeated, tag = "1")]
    pub devices_ids: Vec<String>,
}

/// How the containers get their devices.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AllocateResponse {
    /// In the order of the requests.
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocateResponse>,
}

/// How one container gets its devices. Tags 1, 2, 4 and 5 are not used by us.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContainerAllocateResponse {
    /// Device nodes.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
}

/// A device node.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeviceSpec {
    /// In the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// On the node, as the container runtime sees it.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Of the device cgroup: letters of `rwm`.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn device_messages_are_as_the_kubelet_reads_them() {
        // Bytes by hand after the protobuf encoding guide: field 3, then fields 1, 2, 3 inside.
        let spec = DeviceSpec {
            container_path: "c".into(),
            host_path: "h".into(),
            permissions: "rw".into(),
        };
        let response = ContainerAllocateResponse { devices: vec![spec] };
        assert_eq!(response.encode_to_vec(), b"\x1a\x0a\x0a\x01c\x12\x01h\x1a\x02rw");
        let listed = ListAndWatchResponse {
            devices: vec![Device {
                id: "1".into(),
                health: "Healthy".into(),
            }],
        };
        assert_eq!(listed.encode_to_vec(), b"\x0a\x0c\x0a\x011\x12\x07Healthy");
        // A kubelet of a later version may send fields that we do not know.
        let request = AllocateRequest::decode(&b"\x0a\x05\x0a\x011\x78\x07"[..]).unwrap();
        assert_eq!(request.container_requests[0].devices_ids, ["1"]);
    }
}

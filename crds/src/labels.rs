//! Labels and annotations that more than one part of Kubernest reads or writes.

/// Namespace that Kubernest itself runs in.
pub const SYSTEM_NAMESPACE: &str = "kubernest-system";
/// Value of [`MANAGED_BY`] on everything that Kubernest creates.
pub const MANAGED_BY_VALUE: &str = "kubernest";
/// Kubernetes' recommended label for the tool that manages an object.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Name of the TenantCluster that an object belongs to.
pub const CLUSTER: &str = "kubernest.io/cluster";
/// Name of the slot that an object belongs to.
pub const SLOT: &str = "kubernest.io/slot";
/// Node pool of the slot, or [`crate::CONTROL_PLANE_POOL`].
pub const POOL: &str = "kubernest.io/pool";
/// `control-plane` or `worker`.
pub const ROLE: &str = "kubernest.io/role";
/// Annotation of a slot's VirtualMachine: its fixed address on the tenant network, without prefix length.
pub const NODE_IP: &str = "kubernest.io/node-ip";
/// Annotation on a VirtualMachine: any token; the machine half answers each new token once with the guest's last
/// console lines in `VirtualMachineInstance.status.consoleTail`.
pub const CONSOLE_TAIL_REQUEST: &str = "kubernest.io/console-tail-request";
/// Annotation of a VirtualMachineInstance with `kernelBoot`: kernel arguments added to its own where no hardware
/// virtualisation is used. What guards against the processor's speculation, for example, guards nothing there and costs
/// a quarter of the time that a control plane takes to start.
pub const EMULATION_KERNEL_ARGS: &str = "kubernest.io/emulation-kernel-args";
/// Annotation of a VirtualMachineInstance, `true`: its guest does not report free pages, which spares it that work and costs
/// the node what it has freed (KubeVirt's name).
pub const FREE_PAGE_REPORTING_DISABLED: &str = "kubevirt.io/free-page-reporting-disabled";
/// Annotation of a Node: `kvm` or `tcg`, as the accelerator probe found by booting a tiny guest.
pub const ACCELERATOR: &str = "kubernest.io/accelerator";

/// Label of a Node whose agent is ready to start virtual machines (KubeVirt's name).
pub const SCHEDULABLE: &str = "kubevirt.io/schedulable";
/// Label of a Node: `true` where its kubelet gives processors to one container alone (KubeVirt's name).
pub const CPU_MANAGER: &str = "kubevirt.io/cpumanager";
/// The same under the name that KubeVirt had for it before, and still writes.
pub const CPU_MANAGER_BEFORE: &str = "cpumanager";
/// Label of a VirtualMachineInstance: the node that it is on (KubeVirt's name).
pub const NODE_NAME: &str = "kubevirt.io/nodeName";
/// Label of launcher pods (KubeVirt's name), with value [`LAUNCHER_APP_VALUE`].
pub const LAUNCHER_APP: &str = "kubevirt.io";
/// Value of [`LAUNCHER_APP`].
pub const LAUNCHER_APP_VALUE: &str = "virt-launcher";
/// Label of a launcher pod: UID of its VirtualMachineInstance (KubeVirt's name).
pub const CREATED_BY: &str = "kubevirt.io/created-by";
/// Label of a launcher pod: name of its VirtualMachineInstance (KubeVirt's name).
pub const VM_NAME: &str = "vm.kubevirt.io/name";
/// Label of a launcher pod: what tells its VirtualMachineInstance from others by its name, however long that is; what
/// `virtctl expose` selects (KubeVirt's name).
pub const VMI_ID: &str = "vmi.kubevirt.io/id";
/// Annotation of a launcher pod: the domain's name (KubeVirt's name).
pub const DOMAIN: &str = "kubevirt.io/domain";
/// Extended resource for /dev/kvm (KubeVirt's name).
pub const KVM_RESOURCE: &str = "devices.kubevirt.io/kvm";
/// Extended resource for /dev/net/tun (KubeVirt's name).
pub const TUN_RESOURCE: &str = "devices.kubevirt.io/tun";

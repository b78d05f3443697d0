//! The table of what the group serves; discovery, OpenAPI and authorization are read off it.

/// Group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// Versions, the preferred first. They differ in nothing but the name.
pub const VERSIONS: [&str; 2] = ["v1", "v1alpha3"];
/// Resources of the parents.
pub const MACHINES: &str = "virtualmachines";
/// Resources of the parents.
pub const INSTANCES: &str = "virtualmachineinstances";
/// A resource that is no object: what is asked of a machine stands in the request.
pub const EXPAND_VM_SPEC: &str = "expand-vm-spec";

/// What a subresource does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Start,
    Stop,
    Restart,
    ExpandSpec,
    ExpandGiven,
    PortForward,
    Pause,
    Unpause,
    SoftReboot,
    Reset,
    Console,
    Vnc,
    Screenshot,
    GuestAgent,
}

/// A subresource.
#[derive(Clone, Copy, Debug)]
pub struct Subresource {
    /// Resource of its parent.
    pub parent: &'static str,
    /// Path below the parent, without parameters; empty where the parent itself is asked.
    pub name: &'static str,
    /// What it does.
    pub operation: Operation,
    /// For people.
    pub summary: &'static str,
}

impl Subresource {
    /// Verb that is authorized.
    pub fn verb(&self) -> &'static str {
        if self.changes() { "update" } else { "get" }
    }

    /// HTTP method in OpenAPI.
    pub fn method(&self) -> &'static str {
        if self.changes() { "put" } else { "get" }
    }

    /// Its name in discovery and in RBAC rules.
    pub fn full_name(&self) -> String {
        match self.name {
            "" => self.parent.to_owned(),
            name => format!("{}/{name}", self.parent),
        }
    }

    /// Its path below a namespace, in OpenAPI's notation.
    pub fn path(&self) -> String {
        match self.name {
            "" => self.parent.to_owned(),
            name => format!("{}/{{name}}/{name}", self.parent),
        }
    }

    /// Whether it is put with a body, as what changes something is, rather than got.
    pub fn changes(&self) -> bool {
        use Operation::{
            Console, ExpandGiven, ExpandSpec, GuestAgent, Pause, PortForward, Reset, Restart, Screenshot, SoftReboot,
            Start, Stop, Unpause, Vnc,
        };
        match self.operation {
            Start | Stop | Restart | Pause | Unpause | SoftReboot | Reset | ExpandGiven => true,
            ExpandSpec | PortForward | Console | Vnc | Screenshot | GuestAgent => false,
        }
    }

    /// Kind of what it is asked of.
    pub fn kind(&self) -> &'static str {
        if self.parent == INSTANCES {
            "VirtualMachineInstance"
        } else {
            "VirtualMachine"
        }
    }
}

const fn sub(parent: &'static str, name: &'static str, operation: Operation, summary: &'static str) -> Subresource {
    Subresource {
        parent,
        name,
        operation,
        summary,
    }
}

/// All of them.
pub const ALL: [Subresource; 17] = [
    sub(
        EXPAND_VM_SPEC,
        "",
        Operation::ExpandGiven,
        "The virtual machine of the body with all that its spec refers to",
    ),
    sub(MACHINES, "start", Operation::Start, "Start the virtual machine"),
    sub(MACHINES, "stop", Operation::Stop, "Stop the virtual machine"),
    sub(MACHINES, "restart", Operation::Restart, "Restart the virtual machine"),
    sub(
        MACHINES,
        "expand-spec",
        Operation::ExpandSpec,
        "The virtual machine with all that its spec refers to",
    ),
    sub(
        MACHINES,
        "portforward",
        Operation::PortForward,
        "A websocket to a port of the guest",
    ),
    sub(INSTANCES, "pause", Operation::Pause, "Pause the guest"),
    sub(INSTANCES, "unpause", Operation::Unpause, "Let a paused guest go on"),
    sub(
        INSTANCES,
        "softreboot",
        Operation::SoftReboot,
        "Ask the guest to reboot",
    ),
    sub(INSTANCES, "reset", Operation::Reset, "Reset the guest"),
    sub(
        INSTANCES,
        "console",
        Operation::Console,
        "A websocket to the guest's serial console",
    ),
    sub(
        INSTANCES,
        "vnc",
        Operation::Vnc,
        "A websocket to the guest's screen (RFB)",
    ),
    sub(
        INSTANCES,
        "vnc/screenshot",
        Operation::Screenshot,
        "A picture of the guest's screen (PNG)",
    ),
    sub(
        INSTANCES,
        "portforward",
        Operation::PortForward,
        "A websocket to a port of the guest",
    ),
    sub(
        INSTANCES,
        "guestosinfo",
        Operation::GuestAgent,
        "What the guest agent says of the operating system",
    ),
    sub(
        INSTANCES,
        "userlist",
        Operation::GuestAgent,
        "Users logged in, by the guest agent",
    ),
    sub(
        INSTANCES,
        "filesystemlist",
        Operation::GuestAgent,
        "File systems, by the guest agent",
    ),
];

/// The row of a path below a parent (`portforward/22/tcp` is `portforward`).
pub fn find(parent: &str, path: &str) -> Option<&'static Subresource> {
    let first = path.split('/').next().unwrap_or_default();
    let matches = |row: &&Subresource| {
        let parameters = row.name == "portforward" && first == row.name;
        row.parent == parent && (row.name == path || parameters)
    };
    ALL.iter().find(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_found_by_their_path() {
        assert_eq!(find(INSTANCES, "portforward/22/tcp").unwrap().name, "portforward");
        assert_eq!(find(MACHINES, "start").unwrap().verb(), "update");
        assert!(find(INSTANCES, "start").is_none());
        assert!(find(INSTANCES, "console/x").is_none());
        assert_eq!(
            find(INSTANCES, "vnc/screenshot").unwrap().operation,
            Operation::Screenshot
        );
        assert_eq!(find(INSTANCES, "vnc").unwrap().operation, Operation::Vnc);
        let given = find(EXPAND_VM_SPEC, "").unwrap();
        assert_eq!((given.full_name().as_str(), given.verb()), ("expand-vm-spec", "update"));
        assert!(find(EXPAND_VM_SPEC, "start").is_none() && find(MACHINES, "").is_none());
    }
}

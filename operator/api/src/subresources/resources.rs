//! The table of what the group serves; discovery, OpenAPI and authorization are read off it.

/// Group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// Versions, the preferred first. They differ in nothing but the name.
pub const VERSIONS: [&str; 2] = ["v1", "v1alpha3"];
/// Resources of the parents.
pub const MACHINES: &str = "virtualmachines";
/// Resources of the parents.
pub const INSTANCES: &str = "virtualmachineinstances";

/// What a subresource does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Start,
    Stop,
    Restart,
    ExpandSpec,
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
    /// Path below the parent, without parameters; what RBAC rules name.
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

    /// Whether it changes something, rather than show or stream.
    pub fn changes(&self) -> bool {
        use Operation::{
            Console, ExpandSpec, GuestAgent, Pause, PortForward, Reset, Restart, Screenshot, SoftReboot, Start, Stop,
            Unpause, Vnc,
        };
        match self.operation {
            Start | Stop | Restart | Pause | Unpause | SoftReboot | Reset => true,
            ExpandSpec | PortForward | Console | Vnc | Screenshot | GuestAgent => false,
        }
    }

    /// Kind of the parent.
    pub fn kind(&self) -> &'static str {
        if self.parent == MACHINES {
            "VirtualMachine"
        } else {
            "VirtualMachineInstance"
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
pub const ALL: [Subresource; 16] = [
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
    }
}

//! The table of what the group serves; discovery, OpenAPI and authorization are read off it.

/// Group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// Versions, the preferred first. They differ in nothing but the name.
pub const VERSIONS: [&str; 2] = ["v1", "v1alpha3"];
/// Resources of the parents.
pub const MACHINES: &str = "virtualmachines";
/// Resources of the parents.
pub const INSTANCES: &str = "virtualmachineinstances";

/// A subresource.
#[derive(Clone, Copy, Debug)]
pub struct Subresource {
    /// Resource of its parent.
    pub parent: &'static str,
    /// Path below the parent, without parameters; what RBAC rules name.
    pub name: &'static str,
    /// `get` or `put`.
    pub method: &'static str,
    /// For people.
    pub summary: &'static str,
}

impl Subresource {
    /// Verb that is authorized.
    pub fn verb(&self) -> &'static str {
        if self.method == "get" { "get" } else { "update" }
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

const fn sub(parent: &'static str, name: &'static str, method: &'static str, summary: &'static str) -> Subresource {
    Subresource {
        parent,
        name,
        method,
        summary,
    }
}

/// All of them.
pub const ALL: [Subresource; 15] = [
    sub(MACHINES, "start", "put", "Start the virtual machine"),
    sub(MACHINES, "stop", "put", "Stop the virtual machine"),
    sub(MACHINES, "restart", "put", "Restart the virtual machine"),
    sub(
        MACHINES,
        "expand-spec",
        "get",
        "The virtual machine with all that its spec refers to",
    ),
    sub(MACHINES, "portforward", "get", "A websocket to a port of the guest"),
    sub(INSTANCES, "pause", "put", "Pause the guest"),
    sub(INSTANCES, "unpause", "put", "Let a paused guest go on"),
    sub(INSTANCES, "softreboot", "put", "Ask the guest to reboot"),
    sub(INSTANCES, "reset", "put", "Reset the guest"),
    sub(INSTANCES, "console", "get", "A websocket to the guest's serial console"),
    sub(INSTANCES, "vnc", "get", "A websocket to the guest's screen (RFB)"),
    sub(INSTANCES, "portforward", "get", "A websocket to a port of the guest"),
    sub(
        INSTANCES,
        "guestosinfo",
        "get",
        "What the guest agent says of the operating system",
    ),
    sub(INSTANCES, "userlist", "get", "Users logged in, by the guest agent"),
    sub(INSTANCES, "filesystemlist", "get", "File systems, by the guest agent"),
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
    }
}

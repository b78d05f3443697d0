//! The CNI plugin that container runtimes call: passes the call to the node agent and prints its answer. All netlink,
//! nft and policy live in the agent; this binary decides nothing and needs no library of the host it is copied to.

mod call;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (answer, code) = call::run(std::env::vars(), std::io::stdin());
    if !answer.is_null() {
        println!("{answer}");
    }
    code
}

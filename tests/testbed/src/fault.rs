//! What happens to nodes in tests: killed, powered off, cut off, restored.
//!
//! It deliberately does not wait for Kubernetes to notice a fault; tests do, since that is what they test.

use crate::{
    bed::{Error, Testbed},
    group, net,
    plan::Group,
};

pub(crate) async fn kill(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    Ok(group::hold(&bed.plan, &bed.dir, Group::Node(i)).await?)
}

pub(crate) async fn power_off(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    group::stop(&bed.plan, Group::Node(i)).await?;
    Ok(net::remove_netns(&bed.plan.netns(Group::Node(i))).await?)
}

pub(crate) async fn cut(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    Ok(net::set_port(&bed.plan, i, false).await?)
}

pub(crate) async fn restore(bed: &Testbed, i: usize) -> Result<(), Error> {
    bed.plan.check_node(i)?;
    if net::has_netns(&bed.plan, Group::Node(i)) && !net::port_joined(&bed.plan, i).await {
        net::set_port(&bed.plan, i, true).await?;
    }
    if group::supervisor(&bed.plan, Group::Node(i)).is_some() {
        group::resume(&bed.plan, Group::Node(i))?;
    }
    bed.boot(i).await?;
    let client = bed.client().await?;
    bed.await_node(&client, i).await
}

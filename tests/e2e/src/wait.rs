//! Waiting for conditions by watching, never by sleeping. There is no time limit here: the test runner has one.

use std::fmt::Debug;

use anyhow::{Context, Result};
use kube::Api;
use kube::runtime::wait::{Condition, await_condition};
use serde::de::DeserializeOwned;

/// Waits until `condition` holds for the object, saying so before and after.
pub async fn until<K>(api: &Api<K>, name: &str, what: &str, condition: impl Condition<K>) -> Result<Option<K>>
where
    K: kube::Resource + Clone + Debug + Send + DeserializeOwned + 'static,
{
    let began = std::time::Instant::now();
    println!("-- {name}: waiting: {what}");
    let found = await_condition(api.clone(), name, condition)
        .await
        .with_context(|| format!("waiting for {name}: {what}"))?;
    println!("-- {name}: {what}: after {:.1} s", began.elapsed().as_secs_f64());
    Ok(found)
}

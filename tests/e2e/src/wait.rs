//! Waiting for conditions by watching, never by sleeping. There is no time limit here: the test runner has one.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Api;
use kube::runtime::wait::{Condition, await_condition};
use serde::de::DeserializeOwned;

/// How often a broken watch is begun again.
const RETRIES: u32 = 5;

/// Waits until `condition` holds for the object, saying so before and after.
pub async fn until<K>(api: &Api<K>, name: &str, what: &str, condition: impl Condition<K>) -> Result<Option<K>>
where
    K: kube::Resource + Clone + Debug + Send + DeserializeOwned + 'static,
{
    let began = std::time::Instant::now();
    println!("-- {name}: waiting: {what}");
    let mut failed = 0;
    let found = loop {
        let holds = |object: Option<&K>| condition.matches_object(object);
        match await_condition(api.clone(), name, holds).await {
            // A watch of minutes may break, as through an ingress to an API server that has just started.
            Err(error) if failed < RETRIES => {
                failed += 1;
                println!("-- {name}: {error}; again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            ended => break ended.with_context(|| format!("waiting for {name}: {what}"))?,
        }
    };
    println!("-- {name}: {what}: after {:.1} s", began.elapsed().as_secs_f64());
    Ok(found)
}

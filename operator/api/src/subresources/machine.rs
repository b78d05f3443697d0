//! Subresources of a VirtualMachine: reads what is there, asks [`super::lifecycle`], writes what it says.

use axum::{Json, body::Bytes, http::StatusCode, response::IntoResponse, response::Response};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
    core::NamespaceResourceScope,
};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    FIELD_MANAGER,
    answer::{Failure, Kind},
    lifecycle::{self, Change, Found},
};

/// How often a decision is made anew because what it was made on has changed.
const TRIES: usize = 5;

/// The machine and its instance.
pub struct Machines {
    machines: Api<VirtualMachine>,
    instances: Api<VirtualMachineInstance>,
    name: String,
}

/// Body of a request as options; none is the default.
pub fn options<T: DeserializeOwned + Default>(body: &Bytes) -> Result<T, Failure> {
    let text = body.trim_ascii();
    if text.is_empty() || text == b"null" {
        return Ok(T::default());
    }
    serde_json::from_slice(text)
        .map_err(|error| Failure::bad_request(format!("Can not unmarshal Request body to struct, error: {error}")))
}

/// The API of a kind in a namespace.
pub fn api<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

impl Machines {
    /// Of this name.
    pub fn new(client: &Client, namespace: &str, name: &str) -> Self {
        Self {
            machines: api(client, namespace),
            instances: api(client, namespace),
            name: name.to_owned(),
        }
    }

    /// PUT `start`, `stop` or `restart`.
    pub async fn change(&self, verb: &str, body: &Bytes) -> Result<Response, Failure> {
        let (start, stop, restart);
        let decide: &(dyn Fn(Found<'_>) -> Result<Change, Failure> + Sync);
        let dry_run;
        match verb {
            "start" => {
                let options: lifecycle::StartOptions = options(body)?;
                dry_run = lifecycle::is_dry_run(options.dry_run.as_deref())?;
                start = move |found: Found<'_>| lifecycle::start(found, &options);
                decide = &start;
            }
            "stop" => {
                let options: lifecycle::StopOptions = options(body)?;
                dry_run = lifecycle::is_dry_run(options.dry_run.as_deref())?;
                stop = move |found: Found<'_>| lifecycle::stop(found, &options);
                decide = &stop;
            }
            _ => {
                let options: lifecycle::RestartOptions = options(body)?;
                dry_run = lifecycle::is_dry_run(options.dry_run.as_deref())?;
                restart = move |found: Found<'_>| lifecycle::restart(found, &options);
                decide = &restart;
            }
        }
        let mut tries = 1;
        loop {
            let machine = self.machine().await?;
            let instance = self.instances.get_opt(&self.name).await;
            let instance = instance.map_err(|error| Failure::internal("reading the instance", &error))?;
            let change = decide(Found {
                machine: &machine,
                instance: instance.as_ref(),
            })?;
            match self.write(change, dry_run).await {
                Ok(()) => return Ok(StatusCode::ACCEPTED.into_response()),
                // It changed since it was read: decided anew on what it is now.
                Err(kube::Error::Api(answer)) if is_outdated(&answer) && tries < TRIES => tries += 1,
                Err(kube::Error::Api(answer)) if is_outdated(&answer) => {
                    return Err(Failure::conflict(Kind::Machine, &self.name, &answer.message));
                }
                Err(error) => return Err(Failure::internal("writing the change", &error)),
            }
        }
    }

    /// GET `expand-spec`: nothing that a spec can refer to is supported, so that it is whole as it stands.
    pub async fn expand(&self) -> Result<Response, Failure> {
        Ok(Json(self.machine().await?).into_response())
    }

    async fn machine(&self) -> Result<VirtualMachine, Failure> {
        let found = self.machines.get_opt(&self.name).await;
        found
            .map_err(|error| Failure::internal("reading the machine", &error))?
            .ok_or_else(|| Failure::not_found(Kind::Machine, &self.name))
    }

    async fn write(&self, change: Change, dry_run: bool) -> Result<(), kube::Error> {
        let params = PatchParams {
            dry_run,
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        if let Some(patch) = change.instance {
            self.instances.patch(&self.name, &params, &json_patch(patch)?).await?;
        }
        if let Some(patch) = change.machine {
            self.machines.patch(&self.name, &params, &json_patch(patch)?).await?;
        }
        if let Some(patch) = change.status {
            self.machines
                .patch_status(&self.name, &params, &json_patch(patch)?)
                .await?;
        }
        Ok(())
    }
}

fn json_patch(patch: Value) -> Result<Patch<()>, kube::Error> {
    serde_json::from_value(patch)
        .map(Patch::Json)
        .map_err(kube::Error::SerdeError)
}

/// Whether a write came too late: a conflict, or a JSON patch whose test failed (the API server's 422 without causes).
fn is_outdated(answer: &kube::core::Status) -> bool {
    answer.code == 409 || (answer.code == 422 && answer.message.contains("test operation"))
}

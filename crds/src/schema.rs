//! CRDs as they are installed: derived from the types, then changed so that nothing a user wrote is pruned.
//!
//! The API server drops fields that a structural schema doesn't know before a validating webhook sees them. Kubernest
//! refuses such fields by path instead, so every object below `spec` keeps unknown fields.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceConversion, CustomResourceDefinition, CustomResourceDefinitionVersion, JSONSchemaProps,
    ServiceReference, WebhookClientConfig, WebhookConversion,
};
use kube::CustomResourceExt;

/// All CRDs that Kubernest installs, by file name stem.
pub fn all_crds() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![
        (
            "kubernest.io_tenantclusters",
            keep_unknown_fields(crate::TenantCluster::crd()),
        ),
        ("kubernest.io_networkallocations", crate::NetworkAllocation::crd()),
        (
            "kubevirt.io_virtualmachines",
            with_former_version(keep_unknown_fields(crate::kubevirt::v1::VirtualMachine::crd())),
        ),
        (
            "kubevirt.io_virtualmachineinstances",
            with_former_version(keep_unknown_fields(crate::kubevirt::v1::VirtualMachineInstance::crd())),
        ),
        (
            "kubevirt.io_virtualmachineinstancepresets",
            with_former_version(keep_unknown_fields(
                crate::kubevirt::v1::VirtualMachineInstancePreset::crd(),
            )),
        ),
        (
            "kubevirt.io_virtualmachineinstancereplicasets",
            with_former_version(keep_unknown_fields(
                crate::kubevirt::v1::VirtualMachineInstanceReplicaSet::crd(),
            )),
        ),
    ]
}

/// Serves a kind of KubeVirt as v1alpha3 too, converted by kubernest-api. The caBundle is the running server's to set.
fn with_former_version(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    let former = crd.spec.versions.clone();
    crd.spec
        .versions
        .extend(former.into_iter().map(|version| CustomResourceDefinitionVersion {
            name: "v1alpha3".to_owned(),
            storage: false,
            deprecated: Some(true),
            deprecation_warning: Some(format!(
                "kubevirt.io/v1alpha3 {} is now deprecated and will be removed in a future release.",
                crd.spec.names.kind
            )),
            ..version
        }));
    crd.spec.conversion = Some(CustomResourceConversion {
        strategy: "Webhook".to_owned(),
        webhook: Some(WebhookConversion {
            conversion_review_versions: vec!["v1".to_owned()],
            client_config: Some(WebhookClientConfig {
                service: Some(ServiceReference {
                    namespace: "kubernest-system".to_owned(),
                    name: "kubernest-api".to_owned(),
                    path: Some("/convert".to_owned()),
                    port: Some(443),
                }),
                ..WebhookClientConfig::default()
            }),
        }),
    });
    crd
}

/// Makes every object below `spec` keep unknown fields.
pub fn keep_unknown_fields(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let schema = version
            .schema
            .as_mut()
            .and_then(|validation| validation.open_api_v3_schema.as_mut());
        if let Some(spec) = schema
            .and_then(|schema| schema.properties.as_mut())
            .and_then(|props| props.get_mut("spec"))
        {
            keep(spec);
        }
    }
    crd
}

fn keep(schema: &mut JSONSchemaProps) {
    if let Some(properties) = &mut schema.properties {
        schema.x_kubernetes_preserve_unknown_fields = Some(true);
        properties.values_mut().for_each(keep);
    } else if schema.type_.as_deref() == Some("object") && schema.additional_properties.is_none() {
        schema.x_kubernetes_preserve_unknown_fields = Some(true);
    }
    if let Some(items) = &mut schema.items {
        use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaPropsOrArray;
        match items {
            JSONSchemaPropsOrArray::Schema(item) => keep(item),
            JSONSchemaPropsOrArray::Schemas(all) => all.iter_mut().for_each(keep),
        }
    }
}

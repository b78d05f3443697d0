//! Whether a user may: asked of the API server at every request (SubjectAccessReview), never remembered.

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};

use super::{
    answer::Failure,
    proxy::User,
    resources::{GROUP, Subresource},
};

/// What is to be done to what.
#[derive(Clone, Debug)]
pub struct Request {
    pub version: String,
    pub namespace: String,
    /// Of the object; empty where none is asked.
    pub name: String,
    pub subresource: &'static Subresource,
}

/// Nothing if the user may.
///
/// # Errors
/// 403 if not, 500 if it cannot be told.
pub async fn authorize(client: &Client, user: &User, request: &Request) -> Result<(), Failure> {
    let review = Api::<SubjectAccessReview>::all(client.clone())
        .create(&PostParams::default(), &review(user, request))
        .await
        .map_err(|error| Failure::internal("asking whether the user may", &error))?;
    let status = review.status.unwrap_or_default();
    if status.allowed {
        return Ok(());
    }
    let why = status.reason.filter(|reason| !reason.is_empty());
    Err(Failure::denied(denial(user, request, why.as_deref())))
}

fn review(user: &User, request: &Request) -> SubjectAccessReview {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let attributes = ResourceAttributes {
        group: Some(GROUP.to_owned()),
        version: Some(request.version.clone()),
        namespace: Some(request.namespace.clone()),
        resource: Some(request.subresource.parent.to_owned()),
        subresource: some(request.subresource.name),
        name: some(&request.name),
        verb: Some(request.subresource.verb().to_owned()),
        ..ResourceAttributes::default()
    };
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// Kubernetes' sentence.
fn denial(user: &User, request: &Request, why: Option<&str>) -> String {
    let row = request.subresource;
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    let name = match request.name.as_str() {
        "" => String::new(),
        name => format!(" {name:?}"),
    };
    format!(
        "{}.{GROUP}{name} is forbidden: User {:?} cannot {} resource {:?} in API group {GROUP:?} in the namespace \
         {:?}{why}",
        row.parent,
        user.name,
        row.verb(),
        row.full_name(),
        request.namespace
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subresources::resources;

    fn asked(name: &str, parent: &str, path: &str) -> (User, Request) {
        let user = User {
            name: "ada".to_owned(),
            ..User::default()
        };
        let request = Request {
            version: "v1".to_owned(),
            namespace: "ns".to_owned(),
            name: name.to_owned(),
            subresource: resources::find(parent, path).unwrap(),
        };
        (user, request)
    }

    #[test]
    fn authorize_asks_for_the_verb_on_the_subresource() {
        let (user, request) = asked("vm", resources::INSTANCES, "portforward/22");
        let attributes = review(&user, &request).spec.resource_attributes.unwrap();
        assert_eq!(attributes.subresource.as_deref(), Some("portforward"));
        assert_eq!(attributes.verb.as_deref(), Some("get"));
        assert_eq!(
            denial(&user, &request, None),
            "virtualmachineinstances.subresources.kubevirt.io \"vm\" is forbidden: User \"ada\" cannot get resource \
             \"virtualmachineinstances/portforward\" in API group \"subresources.kubevirt.io\" in the namespace \"ns\""
        );
    }

    #[test]
    fn authorize_asks_for_no_name_where_there_is_no_object() {
        let (user, request) = asked("", resources::EXPAND_VM_SPEC, "");
        let attributes = review(&user, &request).spec.resource_attributes.unwrap();
        assert_eq!((attributes.name, attributes.subresource), (None, None));
        assert_eq!(
            (attributes.resource.as_deref(), attributes.verb.as_deref()),
            (Some("expand-vm-spec"), Some("update"))
        );
        assert_eq!(
            denial(&user, &request, None),
            "expand-vm-spec.subresources.kubevirt.io is forbidden: User \"ada\" cannot update resource \
             \"expand-vm-spec\" in API group \"subresources.kubevirt.io\" in the namespace \"ns\""
        );
    }
}

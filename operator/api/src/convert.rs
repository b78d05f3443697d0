//! Conversion between the versions of `kubevirt.io` (apiextensions.k8s.io/v1 ConversionReview).
//!
//! v1alpha3 is v1 under its former name: only `apiVersion` differs, as upstream.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, SeqAccess, Visitor},
};
use serde_json::{json, value::RawValue};

const VERSIONS: [&str; 2] = ["kubevirt.io/v1", "kubevirt.io/v1alpha3"];

/// The review that the API server sends.
#[derive(Debug, Deserialize)]
struct ConversionReview<'a> {
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Debug, Deserialize)]
struct Request<'a> {
    uid: String,
    #[serde(rename = "desiredAPIVersion")]
    desired: String,
    #[serde(borrow)]
    objects: Option<&'a RawValue>,
}

/// Converts all objects of a review or none.
///
/// # Errors
/// What is no review cannot be answered.
pub fn convert(review: &[u8]) -> serde_json::Result<String> {
    let Request { uid, desired, objects } = serde_json::from_slice::<ConversionReview<'_>>(review)?.request;
    let mut conversion = Conversion {
        desired: serde_json::to_string(&desired)?,
        converted: String::new(),
        message: unknown(&desired),
    };
    if let Some(objects) = objects {
        conversion.deserialize(&mut serde_json::Deserializer::from_str(objects.get()))?;
    }
    let Conversion { converted, message, .. } = conversion;
    let (result, converted) = match message {
        None => (json!({"status": "Success"}), converted),
        Some(message) => {
            tracing::warn!(message, "cannot convert");
            (json!({"status": "Failure", "message": message}), String::new())
        }
    };
    let uid = serde_json::to_string(&uid)?;
    Ok(format!(
        r#"{{"apiVersion":"apiextensions.k8s.io/v1","kind":"ConversionReview","response":{{"uid":{uid},"result":{result},"convertedObjects":[{converted}]}}}}"#
    ))
}

/// Changes one object after the other in its text: of as many as there may be, none is kept.
struct Conversion {
    desired: String,
    converted: String,
    message: Option<String>,
}

impl Conversion {
    fn add(&mut self, object: &str) -> serde_json::Result<()> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Object<'a> {
            #[serde(borrow)]
            api_version: &'a RawValue,
        }
        if self.message.is_some() {
            return Ok(());
        }
        let version = serde_json::from_str::<Object<'_>>(object)?.api_version.get();
        self.message = unknown(&serde_json::from_str::<String>(version)?);
        // Where in the text it is, as it is borrowed from it.
        let start = version.as_ptr().addr() - object.as_ptr().addr();
        let between = if self.converted.is_empty() { "" } else { "," };
        let rest = &object[start + version.len()..];
        for part in [between, &object[..start], &self.desired, rest] {
            self.converted.push_str(part);
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut Conversion {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &mut Conversion {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut objects: A) -> Result<(), A::Error> {
        while let Some(object) = objects.next_element::<&RawValue>()? {
            self.add(object.get()).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

fn unknown(version: &str) -> Option<String> {
    (!VERSIONS.contains(&version)).then(|| {
        let known = VERSIONS.join(", ");
        format!("no conversion from or to {version:?}: known are {known}")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn convert_changes_nothing_but_the_version() {
        let convert = |current: &str, desired: &str| -> Value {
            let object = json!({"apiVersion": current, "kind": "VirtualMachine", "spec": {"apiVersion": 1}});
            let request = json!({"uid": "u", "desiredAPIVersion": desired, "objects": [object, object]});
            let review = json!({"request": request}).to_string();
            serde_json::from_str(&convert(review.as_bytes()).unwrap()).unwrap()
        };
        let answer = convert("kubevirt.io/v1alpha3", "kubevirt.io/v1");
        assert_eq!(answer["response"]["uid"], "u");
        assert_eq!(answer["response"]["result"], json!({"status": "Success"}));
        let converted = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "spec": {"apiVersion": 1}});
        assert_eq!(answer["response"]["convertedObjects"], json!([converted, converted]));
        for (current, desired) in [
            ("kubevirt.io/v1", "kubevirt.io/v2"),
            ("kubevirt.io/v2", "kubevirt.io/v1"),
        ] {
            let answer = convert(current, desired);
            assert_eq!(answer["response"]["result"]["status"], "Failure");
            let message = answer["response"]["result"]["message"].as_str().unwrap();
            assert!(message.contains("\"kubevirt.io/v2\""), "{message}");
            assert_eq!(answer["response"]["convertedObjects"], json!([]));
        }
    }

    #[test]
    fn convert_refuses_what_is_no_review() {
        for text in [
            "",
            "{}",
            r#"{"request":{"uid":"u","desiredAPIVersion":"kubevirt.io/v1","objects":[1]}}"#,
        ] {
            assert!(convert(text.as_bytes()).is_err());
        }
    }
}

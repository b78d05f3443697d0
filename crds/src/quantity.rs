//! Kubernetes quantities that accept a bare number as KubeVirt's CRDs do (`memory: 64M`, `cpu: 2`).
//!
//! k8s-openapi's `Quantity` only reads strings; one object written with a number would then break a whole watch.
//! Source of the grammar: apimachinery `pkg/api/resource/quantity.go`.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// A quantity as the user wrote it; parsed on use so that a bad one can be refused with its own text.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

/// Why a text is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
pub struct ParseQuantityError;

impl Quantity {
    /// The value in thousandths (millicores for CPU), rounded up as Kubernetes does.
    pub fn milli(&self) -> Result<i128, ParseQuantityError> {
        let nano = self.nano()?;
        Ok(nano.div_euclid(1_000_000) + i128::from(nano.rem_euclid(1_000_000) != 0))
    }

    /// The whole value (bytes for memory), rounded up as Kubernetes does.
    pub fn value(&self) -> Result<i128, ParseQuantityError> {
        let nano = self.nano()?;
        Ok(nano.div_euclid(1_000_000_000) + i128::from(nano.rem_euclid(1_000_000_000) != 0))
    }

    /// The text that Kubernetes writes back: the largest suffix of the same kind that leaves a whole number, and no more
    /// than 63 bits. A text that is no quantity stays as it is.
    pub fn canonical(&self) -> String {
        let Ok(nano) = self.nano() else {
            return self.largest_if_too_large();
        };
        if nano > i128::from(i64::MAX) * 1_000_000_000 {
            return i64::MAX.to_string();
        }
        let whole = nano.div_euclid(1_000_000_000);
        let binary = self.0.ends_with('i');
        if binary && nano % 1_000_000_000 == 0 && whole.unsigned_abs() >= 1024 {
            let power = (1..=6).rev().find(|power| whole % 1024i128.pow(*power) == 0);
            let power = power.unwrap_or_default();
            let suffix = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power as usize];
            return format!("{}{suffix}", whole / 1024i128.pow(power));
        }
        let exponential = self.0.contains(['e']) || (self.0.contains('E') && !self.0.ends_with('E'));
        let suffixes = [
            (27, "E", "e18"),
            (24, "P", "e15"),
            (21, "T", "e12"),
            (18, "G", "e9"),
            (15, "M", "e6"),
            (12, "k", "e3"),
            (9, "", ""),
            (6, "m", "e-3"),
            (3, "u", "e-6"),
        ];
        let fits = suffixes.iter().find(|(power, ..)| nano % 10i128.pow(*power) == 0);
        match fits {
            _ if nano == 0 => "0".to_owned(),
            Some((power, suffix, exponent)) => {
                format!(
                    "{}{}",
                    nano / 10i128.pow(*power),
                    if exponential { exponent } else { suffix }
                )
            }
            None => format!("{nano}{}", if exponential { "e-9" } else { "n" }),
        }
    }

    /// A number that even 128 bits do not hold is cut off at 63, as any other that is too large.
    fn largest_if_too_large(&self) -> String {
        let digits = self.0.trim_start_matches('+');
        let huge = digits.len() > 20 && digits.bytes().take(20).all(|byte| byte.is_ascii_digit());
        if huge { i64::MAX.to_string() } else { self.0.clone() }
    }

    fn nano(&self) -> Result<i128, ParseQuantityError> {
        let text = self.0.as_str();
        let end = text
            .find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-'))
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (negative, digits) = match number.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, number.strip_prefix('+').unwrap_or(number)),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if (whole.is_empty() && fraction.is_empty())
            || !format!("{whole}{fraction}").bytes().all(|b| b.is_ascii_digit())
        {
            return Err(ParseQuantityError);
        }
        let (multiplier, exponent) = scale(suffix).ok_or(ParseQuantityError)?;
        let mantissa: i128 = match format!("{whole}{fraction}").parse() {
            Ok(mantissa) => mantissa,
            Err(_) => return Err(ParseQuantityError),
        };
        let shift = exponent + 9 - i32::try_from(fraction.len()).map_err(|_| ParseQuantityError)?;
        let scaled = mantissa.checked_mul(multiplier).ok_or(ParseQuantityError)?;
        let value = match u32::try_from(shift) {
            Ok(up) => 10i128
                .checked_pow(up)
                .and_then(|p| scaled.checked_mul(p))
                .ok_or(ParseQuantityError)?,
            Err(_) => {
                let by = 10i128.checked_pow(shift.unsigned_abs()).ok_or(ParseQuantityError)?;
                scaled / by + i128::from(scaled % by != 0)
            }
        };
        Ok(if negative { -value } else { value })
    }
}

/// Multiplier and power of ten of a suffix.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    let binary = |power: u32| 1024i128.checked_pow(power).map(|m| (m, 0));
    match suffix {
        "" => Some((1, 0)),
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            (-18..=18).contains(&exponent).then_some((1, exponent))
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<Quantity> for k8s_openapi::apimachinery::pkg::api::resource::Quantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Text(String),
            Integer(i64),
            Float(f64),
        }
        Ok(Self(match Either::deserialize(deserializer)? {
            Either::Text(text) => text,
            Either::Integer(number) => number.to_string(),
            Either::Float(number) => number.to_string(),
        }))
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "x-kubernetes-int-or-string": true, "anyOf": [{ "type": "integer" }, { "type": "string" }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("64M", 64_000_000)]
    #[case("1Gi", 1 << 30)]
    #[case("1.5Ki", 1536)]
    #[case("2", 2)]
    #[case("100m", 1)]
    #[case("-64Mi", -(64 << 20))]
    #[case("1e3", 1000)]
    fn quantity_value(#[case] text: &str, #[case] value: i128) {
        assert_eq!(Quantity::from(text).value(), Ok(value));
    }

    #[rstest]
    #[case("")]
    #[case("blabla")]
    #[case("1Q")]
    #[case("1-2")]
    #[case("1e99")]
    fn quantity_refuses(#[case] text: &str) {
        assert_eq!(Quantity::from(text).value(), Err(ParseQuantityError));
    }

    #[test]
    fn quantity_reads_numbers() {
        assert_eq!(serde_json::from_str::<Quantity>("2").unwrap().milli(), Ok(2000));
    }
}

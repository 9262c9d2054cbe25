//! A container's id, judged once where it comes in.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A container's id: it names files and directories on both hosts, so it
/// holds nothing that could lead out of one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "web-1")]
pub struct ContainerId(String);

/// Not a container's id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a container's id has 1 to 255 letters, digits or any of _ + - . and is not . or ..")]
pub struct BadId;

impl ContainerId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContainerId {
    type Error = BadId;

    fn try_from(id: String) -> Result<Self, BadId> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        let named = (1..=255).contains(&id.len()) && id != "." && id != "..";
        if named && id.bytes().all(fits) { Ok(Self(id)) } else { Err(BadId) }
    }
}

impl FromStr for ContainerId {
    type Err = BadId;

    fn from_str(id: &str) -> Result<Self, BadId> {
        id.to_owned().try_into()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out() {
        for bad in ["", ".", "..", "a/b", "../x", "a\0", "a b", &"x".repeat(256)] {
            assert_eq!(bad.parse::<ContainerId>(), Err(BadId), "{bad:?}");
        }
        for good in ["web-1", "a.b_c+d", &"x".repeat(255)] {
            assert_eq!(good.parse::<ContainerId>().unwrap().as_str(), good);
        }
        assert!(serde_json::from_str::<ContainerId>(r#""../etc""#).is_err());
    }
}

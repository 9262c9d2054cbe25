//! The rules of `deny.toml`: by `cargo deny` where it is installed, by our own
//! reading of them where it is not.
//!
//! Building `cargo deny` takes longer than all of CI, so it is used but not
//! installed. What needs no advisory database is checked either way.

use std::{collections::HashSet, fs, process::Stdio};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{DependencyKind, Metadata, Package, PackageId};
use serde::Deserialize;

use crate::{root, setup};

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

/// Licences allowed to one package only.
#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    package: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<String>,
}

/// Checks the packages we link against `deny.toml`.
pub(crate) fn check(metadata: &Metadata) -> Result<()> {
    let complaints = offline(metadata, &rules()?);
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    let installed = setup::cargo()
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !installed {
        println!("lint: cargo deny is not installed; checked licences, bans and sources only");
        return Ok(());
    }
    setup::run(setup::cargo().args(["deny", "--offline", "check", "bans", "licenses", "sources"]))?;
    let fetched = setup::cargo()
        .args(["deny", "fetch"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if fetched {
        return setup::run(setup::cargo().args(["deny", "check", "advisories"]));
    }
    println!("lint: the advisory database cannot be reached; advisories not checked");
    Ok(())
}

fn rules() -> Result<Rules> {
    let path = root().join("deny.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("cannot parse {}", path.display()))
}

/// Licences, bans and sources, from the metadata alone.
fn offline(metadata: &Metadata, rules: &Rules) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in linked(metadata) {
        let name = format!("{} {}", package.name, package.version);
        if rules.bans.deny.iter().any(|banned| *banned == package.name.as_str()) {
            complaints.push(format!("{name} is banned by deny.toml"));
        }
        if package.source.as_ref().is_some_and(|s| !s.is_crates_io()) {
            complaints.push(format!("{name} does not come from crates.io"));
        }
        let mut allow = rules.licenses.allow.clone();
        for exception in &rules.licenses.exceptions {
            if exception.package == package.name.as_str() {
                allow.extend_from_slice(&exception.allow);
            }
        }
        match license(package) {
            None => complaints.push(format!("{name} names no licence")),
            Some(license) if !is_allowed(&license, &allow) => {
                complaints
                    .push(format!("{name} is under {license}, which deny.toml does not allow"));
            }
            Some(_) => {}
        }
    }
    complaints
}

/// The licence a package names, or the one its licence file is the text of.
fn license(package: &Package) -> Option<String> {
    if package.license.is_some() {
        return package.license.clone();
    }
    let text = fs::read_to_string(package.license_file()?).ok()?;
    text.contains("Permission is hereby granted, free of charge, to any person obtaining a copy")
        .then(|| "MIT".to_owned())
}

/// Every package that ends up in, or builds, one of our programs on Linux.
fn linked(metadata: &Metadata) -> Vec<&Package> {
    let Some(resolve) = &metadata.resolve else { return Vec::new() };
    let mut todo: Vec<&PackageId> = metadata.workspace_members.iter().collect();
    let mut seen: HashSet<&PackageId> = todo.iter().copied().collect();
    while let Some(id) = todo.pop() {
        for dependency in resolve[id].deps.iter() {
            let needed = dependency.dep_kinds.iter().any(|kind| {
                kind.kind != DependencyKind::Development
                    && kind.target.as_ref().is_none_or(|t| !t.to_string().contains("windows"))
            });
            if needed && seen.insert(&dependency.pkg) {
                todo.push(&dependency.pkg);
            }
        }
    }
    metadata.packages.iter().filter(|package| seen.contains(&package.id)).collect()
}

fn is_allowed(license: &str, allow: &[String]) -> bool {
    let Ok(expression) = spdx::Expression::parse_mode(license, spdx::ParseMode::LAX) else {
        return false;
    };
    expression.evaluate(|requirement| allow.contains(&requirement.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_needs_one_allowed_licence_and_a_sum_all() {
        let allow = ["MIT".to_owned(), "Apache-2.0 WITH LLVM-exception".to_owned()];
        assert!(is_allowed("MIT OR GPL-3.0-only", &allow));
        assert!(is_allowed("MIT/Apache-2.0", &allow));
        assert!(is_allowed("Apache-2.0 WITH LLVM-exception", &allow));
        assert!(!is_allowed("MIT AND GPL-3.0-only", &allow));
        assert!(!is_allowed("our own terms", &allow));
    }

    #[test]
    fn the_rules_can_be_read() {
        let rules = rules().unwrap();
        assert!(rules.licenses.allow.contains(&"MIT".to_owned()));
        assert!(rules.bans.deny.contains(&"openssl".to_owned()));
    }
}

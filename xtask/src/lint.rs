//! `cargo xtask lint`: everything that can be said about the source without
//! running it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Metadata, MetadataCommand};

use crate::{FAULTS, deny, root, setup};

/// Which of our packages each may depend on (STYLE.md, "Crates").
const MAY_DEPEND: &[(&str, &[&str])] = &[
    ("dunlin-api", &[]),
    ("dunlin-checkpoint", &[]),
    ("dunlin-runtime-plugin", &["dunlin-api", "dunlin-checkpoint"]),
    ("dunlin-shim", &["dunlin-api", "dunlin-checkpoint"]),
];

/// Packages that may depend on everything of ours.
const ON_TOP: &[&str] = &["dunlin-tests", "dunlin-examples", "xtask"];

/// A file of this length has a second noun in it.
const MAX_LINES: usize = 600;

/// Checks all of it and fails with the first thing wrong.
pub(crate) fn run() -> Result<()> {
    setup::install(&[setup::BUILD])?;
    setup::run(setup::cargo().args(["fmt", "--all", "--check"]))?;
    let metadata = metadata()?;
    complain(dependency_direction(&metadata))?;
    complain(source_shape(&sources()?)?)?;
    deny::check(&metadata)?;
    setup::run(setup::cargo().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        FAULTS[0],
        FAULTS[1],
        "--",
        "-Dwarnings",
    ]))?;
    // What is released has no such points.
    setup::run(setup::cargo().args(["check", "--quiet", "--workspace", "--bins"]))?;
    println!("lint: all good");
    Ok(())
}

fn complain(complaints: Vec<String>) -> Result<()> {
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

fn metadata() -> Result<Metadata> {
    MetadataCommand::new()
        .current_dir(root())
        .exec()
        .context("cannot read the workspace's metadata")
}

/// Says which of our packages depends on one that it must not know.
fn dependency_direction(metadata: &Metadata) -> Vec<String> {
    let ours = metadata.workspace_packages();
    let mut complaints = Vec::new();
    for package in &ours {
        let name = package.name.as_str();
        if ON_TOP.contains(&name) {
            continue;
        }
        let Some((_, allowed)) = MAY_DEPEND.iter().find(|(known, _)| *known == name) else {
            complaints.push(format!("package {name} has no place in the dependency order"));
            continue;
        };
        for dependency in &package.dependencies {
            let other = dependency.name.as_str();
            if ours.iter().any(|p| p.name == other) && !allowed.contains(&other) {
                complaints.push(format!("{name} must not depend on {other}"));
            }
        }
    }
    complaints
}

/// Every Rust file of the project with its text.
fn sources() -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            if path.is_dir() {
                if name != "target" && !name.as_encoded_bytes().starts_with(b".") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path)?;
                files.push((path, text));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Says which file does not say what it is, and which holds too much.
fn source_shape(files: &[(PathBuf, String)]) -> Result<Vec<String>> {
    let root = root();
    let mut complaints = Vec::new();
    for (path, text) in files {
        let path: &Path = path.strip_prefix(&root)?;
        if !text.starts_with("//! ") {
            complaints.push(format!("{} does not begin with `//!`", path.display()));
        }
        let lines = text.lines().count();
        if MAX_LINES < lines {
            complaints.push(format!("{} has {lines} lines: find its second noun", path.display()));
        }
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_depend_in_one_direction() {
        assert_eq!(dependency_direction(&metadata().unwrap()), Vec::<String>::new());
    }

    #[test]
    fn a_dependency_against_the_direction_is_named() {
        let mut metadata = metadata().unwrap();
        let dependency = metadata
            .packages
            .iter()
            .find(|p| p.name == "dunlin-shim")
            .and_then(|shim| shim.dependencies.iter().find(|d| d.name == "dunlin-checkpoint"))
            .unwrap()
            .clone();
        let api = metadata.packages.iter_mut().find(|p| p.name == "dunlin-api").unwrap();
        api.dependencies.push(dependency);
        assert_eq!(
            dependency_direction(&metadata),
            ["dunlin-api must not depend on dunlin-checkpoint"]
        );
    }

    #[test]
    fn files_say_what_they_are_and_hold_one_noun() {
        let files = sources().unwrap();
        assert!(files.iter().any(|(path, _)| path.ends_with("xtask/src/lint.rs")));
        assert_eq!(source_shape(&files).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_silent_and_a_long_file_are_named() {
        let path = root().join("api/src/made_up.rs");
        let complaints = source_shape(&[(path, "\n".repeat(MAX_LINES + 1))]).unwrap();
        assert_eq!(
            complaints,
            [
                "api/src/made_up.rs does not begin with `//!`",
                "api/src/made_up.rs has 601 lines: find its second noun"
            ]
        );
    }
}

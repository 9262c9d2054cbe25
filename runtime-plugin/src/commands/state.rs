//! `state` and `list`.

use anyhow::{Context, Result, bail};
use libcontainer::container::Container;
use liboci_cli::{List, State};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use super::{print, print_json};
use crate::container::Root;

/// Prints the OCI state of a container.
pub(crate) fn state(root: &Root, args: &State) -> Result<u8> {
    print_json(&describe(&root.load(&args.container_id)?)?)?;
    Ok(0)
}

/// Prints all containers.
pub(crate) fn list(root: &Root, args: &List) -> Result<u8> {
    let ids = root.ids()?;
    if args.quiet {
        for id in ids {
            print(&id)?;
        }
        return Ok(0);
    }
    let mut containers = Vec::new();
    for id in ids {
        match root.load(&id).and_then(|container| describe(&container)) {
            Ok(container) => containers.push(container),
            // It may have been deleted since the ids were read.
            Err(err) => tracing::warn!(%id, "{err:#}"),
        }
    }
    match args.format.as_str() {
        "json" => print(&serde_json::to_string(&containers)?)?,
        "table" => print(&table(&containers))?,
        other => bail!("unknown format {other}; it is table or json"),
    }
    Ok(0)
}

/// The state of a container with the keys that runc gives it.
fn describe(container: &Container) -> Result<Value> {
    let mut state = serde_json::to_value(&container.state).context("cannot show the state")?;
    state["owner"] = match container.creator() {
        Some(name) => name.to_string_lossy().into(),
        None => "".into(),
    };
    let config = container.bundle().join("config.json");
    let root =
        Spec::load(config).ok().and_then(|spec| spec.root().as_ref().map(|r| r.path().clone()));
    if let Some(root) = root {
        state["rootfs"] = json!(container.bundle().join(root));
    }
    Ok(state)
}

fn table(containers: &[Value]) -> String {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let rows = containers.iter().map(|container| {
        ["id", "pid", "status", "bundle", "created", "owner"].map(|key| match &container[key] {
            Value::String(text) => text.clone(),
            Value::Null => "0".into(),
            other => other.to_string(),
        })
    });
    let rows: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len() + 3);
        }
    }
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<String>().trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

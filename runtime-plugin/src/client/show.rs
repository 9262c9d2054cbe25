//! Answers of the shim as text for people.

use dunlin_api::rest::{
    Container, ContainerId, Judgement, Migration, MigrationState, Node, Origin, Report, Verdict,
};
use serde::Serialize;

/// Rows under a header, columns as wide as they must be.
fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<_> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let lines: Vec<_> = std::iter::once(&header.map(str::to_owned)).chain(rows).map(line).collect();
    lines.join("\n")
}

/// The name of an enum's value as the API writes it.
fn name(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// A verdict, one finding a line.
pub(crate) fn verdict(id: &ContainerId, to: &str, verdict: &Verdict) -> String {
    let refused = |judgement| if judgement == Judgement::Refused { "no" } else { "with a loss" };
    let rows: Vec<_> = verdict
        .findings
        .iter()
        .map(|finding| {
            [
                refused(finding.judgement).to_owned(),
                finding.node.clone(),
                format!("{} {}", finding.object, finding.reason),
                finding.remedy.clone(),
            ]
        })
        .collect();
    let said = match (verdict.movable, rows.is_empty()) {
        (true, true) => return format!("{id} can move to {to}"),
        (true, false) => format!("{id} can move to {to}, with losses:"),
        (false, _) => format!("{id} cannot move to {to}:"),
    };
    format!("{said}\n{}", table(["MOVES", "NODE", "WHY", "WHAT TO DO"], &rows))
}

/// Migrations, one a line.
pub(crate) fn migrations(all: &[Migration]) -> String {
    let rows: Vec<_> = all
        .iter()
        .map(|migration| {
            let (direction, state) = match &migration.state {
                MigrationState::Out(state) => ("to", name(state)),
                MigrationState::In(state) => ("from", name(state)),
            };
            [
                migration.id.to_string(),
                migration.container.to_string(),
                format!("{direction} {}", migration.peer),
                state,
                migration.report.map_or_else(String::new, |report| millis(report.downtime_us)),
                migration.error.as_ref().map_or_else(String::new, ToString::to_string),
            ]
        })
        .collect();
    table(["ID", "CONTAINER", "PEER", "STATE", "DOWNTIME", "ERROR"], &rows)
}

/// Containers, one a line.
pub(crate) fn containers(all: &[Container]) -> String {
    let rows: Vec<_> = all
        .iter()
        .map(|container| {
            [
                container.id.to_string(),
                name(&container.status),
                container.pid.map_or_else(String::new, |pid| pid.to_string()),
                match &container.origin {
                    Origin::Dunlin => "dunlin".into(),
                    Origin::Hook { runtime, .. } => runtime.clone(),
                },
                container.bundle.clone(),
            ]
        })
        .collect();
    table(["CONTAINER", "STATUS", "PID", "RUNTIME", "BUNDLE"], &rows)
}

/// The node.
pub(crate) fn node(node: &Node) -> String {
    let peers: Vec<_> =
        node.peers.iter().map(|peer| format!("{} ({})", peer.name, peer.url)).collect();
    let draining = if node.draining { ", takes nothing in" } else { "" };
    format!(
        "node        {}{draining}\n\
         version     {}, protocol {:?}, image {}\n\
         kernel      {} {}\n\
         processors  {}\n\
         memory      {} MiB, {} MiB free\n\
         migrations  {} of at most {}\n\
         peers       {}\n",
        node.name,
        node.version,
        node.wire_versions,
        node.image_version,
        node.kernel,
        node.arch,
        node.cpus,
        node.memory_total >> 20,
        node.memory_available >> 20,
        node.migrations,
        node.max_migrations,
        if peers.is_empty() { "none".into() } else { peers.join(", ") },
    )
}

/// What a migration that succeeded did.
pub(crate) fn report(migration: &Migration, report: &Report) -> String {
    format!(
        "{} runs at {}: it stood still for {} ({} frozen, {} sent, {} built, {} switched), \
         {} in all, {} bytes, {} of them in {} rounds ahead, {} processes",
        migration.container,
        migration.peer,
        millis(report.downtime_us),
        millis(report.freeze_us),
        millis(report.dump_us),
        millis(report.ready_us),
        millis(report.commit_us),
        millis(report.total_us),
        report.bytes,
        report.ahead_bytes,
        report.rounds,
        report.processes,
    )
}

fn millis(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use dunlin_api::ErrorCode;
    use dunlin_api::rest::Finding;

    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["a".into(), "bbb".into()], ["cccc".into(), "d".into()]];
        assert_eq!(table(["X", "Y"], &rows), "X     Y\na     bbb\ncccc  d");
    }

    #[test]
    fn a_verdict_names_object_and_remedy() {
        let finding = Finding {
            node: "a".into(),
            object: "fd 9 of pid 4711".into(),
            judgement: Judgement::Refused,
            reason: "is an io_uring".into(),
            remedy: "close it".into(),
            code: ErrorCode::Unmovable,
        };
        let id = "web-1".parse().unwrap();
        let text = verdict(&id, "b", &Verdict::of(vec![finding]));
        assert!(text.starts_with("web-1 cannot move to b:\nMOVES"), "{text}");
        assert!(text.contains("no     a     fd 9 of pid 4711 is an io_uring  close it"), "{text}");
        assert_eq!(verdict(&id, "b", &Verdict::of(vec![])), "web-1 can move to b");
    }
}

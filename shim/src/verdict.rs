//! The destination's half of a verdict, and refusals out of findings.

use std::path::{Path, PathBuf};

use dunlin_api::{
    ErrorCode, Problem,
    rest::{CanAccept, ContainerId, Finding, Judgement},
    wire::{self, Bundle},
};
use dunlin_checkpoint::image;

use crate::{config::Config, host::Host};

/// What this node knows of itself when it judges.
pub(crate) struct Here<'a> {
    pub(crate) config: &'a Config,
    pub(crate) host: &'a Host,
    /// Bytes of memory that could be promised.
    pub(crate) free: u64,
    /// Whether a container of the id exists or is coming.
    pub(crate) taken: bool,
    /// Whether the node is being emptied.
    pub(crate) draining: bool,
    /// Whether another migration may start.
    pub(crate) slot: bool,
}

/// Everything that speaks against taking what is asked.
pub(crate) fn judge(asked: &CanAccept, here: &Here<'_>) -> Vec<Finding> {
    let (needs, host) = (&asked.needs, here.host);
    let id = &asked.container;
    let mut findings = Vec::new();
    let mut refuse = |code, object: &str, reason: String, remedy: &str| {
        findings.push(Finding {
            node: here.config.node.clone(),
            object: object.to_owned(),
            judgement: Judgement::Refused,
            reason,
            remedy: remedy.to_owned(),
            code,
        });
    };
    if here.draining {
        refuse(ErrorCode::Draining, "node", "is being drained".into(), "choose another node");
    }
    if !here.slot {
        let most = here.config.max_migrations;
        let reason = format!("runs {most} migrations already, the most it may");
        refuse(ErrorCode::TooManyMigrations, "node", reason, "try again when one has ended");
    }
    if wire::choose(&asked.wire_versions, wire::VERSIONS).is_none() {
        let (theirs, ours) = (&asked.wire_versions, wire::VERSIONS);
        let reason = format!("has versions {ours:?} here, {theirs:?} at the source");
        refuse(ErrorCode::VersionMismatch, "protocol", reason, "run the same release on both");
    }
    if needs.image_version != image::VERSION {
        let reason = format!("has version {} here, {} there", image::VERSION, needs.image_version);
        refuse(ErrorCode::VersionMismatch, "image", reason, "run the same release on both");
    }
    if here.taken {
        let remedy = "delete or rename the container there";
        refuse(ErrorCode::IdTaken, &format!("id {id}"), "is taken".into(), remedy);
    }
    if let Err(reason) = find_bundle(here.config, id, &asked.bundle) {
        let (object, remedy) = (format!("bundle of {id}"), "put it there, or name another");
        refuse(ErrorCode::BundleMissing, &object, format!("is missing: {reason}"), remedy);
    }
    if host.arch != needs.arch {
        let reason = format!("is {}, the source {}", host.arch, needs.arch);
        refuse(ErrorCode::ArchMismatch, "architecture", reason, "choose a node of the same kind");
    } else {
        let lacks = host.lacks(&needs.cpu_features);
        if !lacks.is_empty() {
            let reason = format!("lacks {}", lacks.join(", "));
            let remedy = "choose a node whose processor has them";
            refuse(ErrorCode::CpuMismatch, "processor", reason, remedy);
        }
    }
    if !host.kernel_is_new_enough() {
        let reason = format!("{} is older than 6.7", host.kernel);
        refuse(ErrorCode::KernelTooOld, "kernel", reason, "update it");
    }
    if here.free < needs.memory {
        let reason = format!("is short: {} bytes are free, {} needed", here.free, needs.memory);
        refuse(ErrorCode::NoRoom, "memory", reason, "free some, or choose another node");
    }
    findings
}

/// The problem a refused migration fails with.
pub(crate) fn refusal(finding: &Finding) -> Problem {
    let Finding { node, object, reason, .. } = finding;
    Problem::new(finding.code, object.as_str(), format!("{object} {reason} (on {node})"))
}

/// Where the bundle of an incoming container lies: as asked, else below our
/// own directory, else where the source has it.
pub(crate) fn find_bundle(
    config: &Config,
    id: &ContainerId,
    bundle: &Bundle,
) -> Result<PathBuf, String> {
    let usable = |path: &Path| path.is_absolute() && path.join("config.json").is_file();
    if let Some(asked) = &bundle.destination {
        let path = PathBuf::from(asked);
        return if usable(&path) { Ok(path) } else { Err(format!("{asked} has no config.json")) };
    }
    let own = config.bundles.as_ref().map(|dir| dir.join(id.as_str()));
    if let Some(own) = own.as_deref().filter(|path| usable(path)) {
        return Ok(own.to_owned());
    }
    let same = PathBuf::from(&bundle.source);
    if usable(&same) {
        return Ok(same);
    }
    let tried = own.map(|own| format!("neither {} nor ", own.display())).unwrap_or_default();
    Err(format!("{tried}{} has a config.json", same.display()))
}

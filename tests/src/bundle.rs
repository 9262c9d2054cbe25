//! OCI bundles made from programs of this machine.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt::Write as _,
    fs, io,
    net::Ipv4Addr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::runtime::{
    LinuxNamespaceType, Mount, MountBuilder, ProcessBuilder, RootBuilder, Spec, UserBuilder,
};

use crate::hosts::{BRIDGE, Host, PREFIX};

/// A bundle's folder and what is going to be its `config.json`.
///
/// ```no_run
/// # use dunlin_tests::{bundle::Bundle, hosts::Hosts};
/// # fn main() -> anyhow::Result<()> {
/// # let hosts = Hosts::new(&["a"])?;
/// let mut bundle = Bundle::on(&hosts["a"], "web")?;
/// bundle.busybox()?.args(["httpd", "-f", "-p", "80"]);
/// bundle.save()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Bundle {
    folder: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    cgroup: String,
    annotations: HashMap<String, String>,
    netns: Option<PathBuf>,
    user: (u32, u32),
    mounts: Vec<Mount>,
}

impl Bundle {
    /// Makes an empty bundle in `folder`, which must not exist; its containers
    /// live in `cgroup`.
    pub fn new(folder: impl Into<PathBuf>, cgroup: impl Into<String>) -> Result<Self> {
        let folder = folder.into();
        let rootfs = folder.join("rootfs");
        for place in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"] {
            fs::create_dir_all(rootfs.join(place))?;
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
        fs::write(rootfs.join("etc/group"), "root:x:0:\n")?;
        Ok(Self {
            folder,
            args: Vec::new(),
            env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
            cgroup: cgroup.into(),
            annotations: HashMap::new(),
            netns: None,
            user: (0, 0),
            mounts: Vec::new(),
        })
    }

    /// Makes an empty bundle for container `id` in the host's folder; the host
    /// finds it at [`Bundle::on_host`].
    pub fn on(host: &Host, id: &str) -> Result<Self> {
        Self::new(host.folder().join(id), format!("{}/{id}", host.cgroup()))
    }

    /// Where a host finds the bundle that [`Bundle::on`] made for `id`.
    #[must_use]
    pub fn on_host(id: &str) -> PathBuf {
        Path::new(crate::hosts::FOLDER).join(id)
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its root file system.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// Copies a program and the libraries it loads to the same paths.
    pub fn program(&mut self, path: impl AsRef<Path>) -> Result<&mut Self> {
        let path = path.as_ref();
        self.program_as(path, path)
    }

    /// Copies a program to `place` and the libraries it loads to their paths.
    pub fn program_as(&mut self, path: &Path, place: &Path) -> Result<&mut Self> {
        self.copy(path, place)?;
        for library in libraries(path)? {
            self.copy(&library, &library)?;
        }
        Ok(self)
    }

    /// Copies busybox, with a link for each program in it.
    pub fn busybox(&mut self) -> Result<&mut Self> {
        let busybox = Path::new("/bin/busybox");
        self.program(busybox)?;
        let list = Command::new(busybox).arg("--list").output().context("cannot run busybox")?;
        for name in String::from_utf8(list.stdout)?.lines() {
            match symlink("busybox", self.rootfs().join("bin").join(name)) {
                Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(err.into()),
                _ => {}
            }
        }
        Ok(self)
    }

    /// Shows it all programs of this machine, which it cannot change.
    pub fn machine(&mut self) -> Result<&mut Self> {
        for link in ["bin", "lib", "lib64", "sbin"] {
            let place = self.rootfs().join(link);
            if place.is_dir() {
                fs::remove_dir_all(&place)?;
            }
            symlink(Path::new("usr").join(link), place)?;
        }
        for place in ["/usr", "/etc"] {
            self.mount(Path::new(place), place, "ro")?;
        }
        Ok(self)
    }

    /// Has it see `folder` at `place`.
    pub fn volume(&mut self, folder: &Path, place: &str) -> Result<&mut Self> {
        self.mount(folder, place, "rw")?;
        Ok(self)
    }

    fn mount(&mut self, folder: &Path, place: &str, mode: &str) -> Result<()> {
        let options = vec!["rbind".to_owned(), mode.to_owned()];
        let mount = MountBuilder::default()
            .destination(place)
            .typ("bind")
            .source(folder)
            .options(options)
            .build()?;
        self.mounts.push(mount);
        Ok(())
    }

    /// Whose process it is.
    pub fn user(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.user = (uid, gid);
        self
    }

    /// What the container runs.
    pub fn args<S: Into<String>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a variable to its environment.
    pub fn env(&mut self, name: &str, value: &str) -> &mut Self {
        self.env.push(format!("{name}={value}"));
        self
    }

    /// Adds an annotation.
    pub fn annotate(&mut self, name: &str, value: &str) -> &mut Self {
        self.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Attaches it to the bridge of whichever host it runs on, always under
    /// the same addresses.
    pub fn address(&mut self, address: Ipv4Addr) -> &mut Self {
        let [a, b, c, d] = address.octets();
        self.annotate("dunlin.network.bridge", BRIDGE)
            .annotate("dunlin.network.interface", "eth0")
            .annotate("dunlin.network.address", &format!("{address}/{PREFIX}"))
            .annotate("dunlin.network.mac", &format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}"))
    }

    /// Has it join a network namespace instead of making one.
    pub fn netns(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.netns = Some(path.into());
        self
    }

    /// What will be in `config.json`.
    pub fn spec(&self) -> Result<Spec> {
        ensure!(!self.args.is_empty(), "the container of {} runs nothing", self.folder.display());
        let process = ProcessBuilder::default()
            .terminal(false)
            .cwd("/")
            .args(self.args.clone())
            .env(self.env.clone())
            .user(UserBuilder::default().uid(self.user.0).gid(self.user.1).build()?)
            .build()?;
        let mut spec = Spec::default();
        spec.set_process(Some(process))
            .set_root(Some(RootBuilder::default().path("rootfs").readonly(false).build()?))
            .set_hostname(self.folder.file_name().map(|name| name.to_string_lossy().into_owned()))
            .set_annotations(Some(self.annotations.clone()));
        spec.mounts_mut().get_or_insert_default().extend(self.mounts.clone());
        let linux = spec.linux_mut().as_mut().context("the default spec is for Linux")?;
        linux.set_cgroups_path(Some(self.cgroup.clone().into()));
        for namespace in linux.namespaces_mut().iter_mut().flatten() {
            if namespace.typ() == LinuxNamespaceType::Network {
                namespace.set_path(self.netns.clone());
            }
        }
        Ok(spec)
    }

    /// Writes `config.json`.
    pub fn save(&self) -> Result<()> {
        Ok(self.spec()?.save(self.folder.join("config.json"))?)
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        let place = self.rootfs().join(to.strip_prefix("/").unwrap_or(to));
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from, &place).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    }
}

/// The Redis server of Debian, keeping everything in memory and nothing on disk.
pub fn redis(bundle: &mut Bundle) -> Result<()> {
    // Both names are one program, which looks at its own name; the second one
    // comes without a service.
    let program = ["/usr/bin/redis-server", "/usr/bin/redis-check-rdb"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("redis is not installed")?;
    bundle.program_as(program, Path::new("/usr/bin/redis-server"))?;
    bundle.args(["/usr/bin/redis-server", "--protected-mode", "no", "--save", ""]);
    Ok(())
}

/// What the dynamic linker would load for `program`, itself included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    if said.contains("not a dynamic executable") || said.contains("statically linked") {
        return Ok(Vec::new());
    }
    if !output.status.success() || said.contains("not found") {
        let mut why = format!("cannot find the libraries of {}", program.display());
        write!(why, ": {}", said.trim())?;
        bail!(why);
    }
    let paths = said
        .lines()
        .flat_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(OsStr::new);
    Ok(paths.map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_its_libraries() {
        let folder = tempfile::tempdir().unwrap();
        let mut bundle = Bundle::new(folder.path().join("sh"), "/dunlin-test").unwrap();
        bundle.program("/bin/bash").unwrap().args(["/bin/bash", "-c", "echo $((6 * 7))"]);
        bundle.save().unwrap();
        let output = Command::new("chroot")
            .arg(bundle.rootfs())
            .args(bundle.spec().unwrap().process().as_ref().unwrap().args().as_ref().unwrap())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n", "{output:?}");
        let spec = Spec::load(bundle.folder().join("config.json")).unwrap();
        assert_eq!(spec, bundle.spec().unwrap());
    }

    #[test]
    fn busybox_is_a_shell() {
        let folder = tempfile::tempdir().unwrap();
        let mut bundle = Bundle::new(folder.path().join("sh"), "/dunlin-test").unwrap();
        bundle.busybox().unwrap();
        let output = Command::new("chroot")
            .arg(bundle.rootfs())
            .args(["sh", "-c", "ls / | head -n 1"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "bin\n", "{output:?}");
    }

    #[test]
    fn a_container_that_runs_nothing_is_no_bundle() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(folder.path().join("empty"), "/dunlin-test").unwrap();
        let err = bundle.save().unwrap_err();
        assert!(err.to_string().ends_with("runs nothing"), "{err}");
    }
}

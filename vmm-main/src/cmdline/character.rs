//! `-serial`, `-chardev`, `-qmp`, `-mon`.

use std::path::PathBuf;

use ipc::limits;
use ipc::spec::vm::{ChardevBackend, ChardevSpec, MonitorAddress, MonitorSpec};

use super::Given;
use super::error::CmdlineError;
use super::props::{Props, is_id, read_int};

/// Bytes of a unix socket's path without its NUL (`sun_path` has 108).
const MAX_SOCKET_PATH: usize = 107;

impl super::Draft {
    /// `-serial`
    pub(super) fn serial(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        given.value.clone_into(&mut self.serial_arg);
        if let Some(id) = given.value.strip_prefix("chardev:") {
            if !is_id(id) {
                return Err(given.error("names no chardev; allowed: chardev:ID"));
            }
            self.spec.serial = Some(id.to_owned());
            return Ok(());
        }
        let props = given.props()?;
        if props.shape() == "none" {
            return Ok(());
        }
        let taken = |id: &str| self.spec.chardevs.iter().any(|chardev| chardev.id == id);
        let id = (0_u32..)
            .map(|n| format!("serial{n}"))
            .find(|id| !taken(id))
            .ok_or_else(|| given.error("no id is free"))?;
        self.spec.serial = Some(id.clone());
        self.add_chardev(id, &props)
    }

    /// `-chardev`
    pub(super) fn chardev(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let id = props.required("id")?;
        // One that -serial has made gives way: its name is nobody's choice.
        if let Some(made) = self.made_by_serial()
            && self.spec.chardevs[made].id == id
        {
            let other = format!("{id}-port");
            self.spec.chardevs[made].id.clone_from(&other);
            self.spec.serial = Some(other);
        }
        if self.spec.chardevs.iter().any(|other| other.id == id) {
            return Err(props.error(format!("id {id} is used by another -chardev")));
        }
        self.add_chardev(id, props)
    }

    /// Position of the chardev that `-serial` implies.
    fn made_by_serial(&self) -> Option<usize> {
        if self.serial_arg.starts_with("chardev:") {
            return None;
        }
        let serial = self.spec.serial.as_ref()?;
        self.spec
            .chardevs
            .iter()
            .position(|chardev| chardev.id == *serial)
    }

    fn add_chardev(&mut self, id: String, props: &Props<'_>) -> Result<(), CmdlineError> {
        let backend = match props.shape() {
            "stdio" => {
                let stdio = |other: &&ChardevSpec| other.backend == ChardevBackend::Stdio;
                if let Some(other) = self.spec.chardevs.iter().find(stdio) {
                    return Err(props.error(format!(
                        "standard input and output belong to chardev {}",
                        other.id
                    )));
                }
                ChardevBackend::Stdio
            }
            "pty" => ChardevBackend::Pty,
            "socket" => {
                let (server, nowait) = server_nowait(props)?;
                match (props.text("path"), props.fds("fd")) {
                    (Some(path), None) => ChardevBackend::Socket {
                        path: socket_path(props, path)?,
                        server,
                        nowait,
                    },
                    (None, Some(&[fd])) => ChardevBackend::Inherited { fd, server, nowait },
                    (Some(_), Some(_)) => {
                        return Err(props.error("path and fd contradict each other"));
                    }
                    (None, _) => {
                        return Err(props.error("path= is missing; allowed: path=PATH or fd=FD"));
                    }
                }
            }
            "file" => ChardevBackend::File {
                path: props.required("path")?.into(),
            },
            other => {
                return Err(props.error(format!("backend {other} is not available in this build")));
            }
        };
        self.spec.chardevs.push(ChardevSpec { id, backend });
        self.chardev_args.push(props.raw().to_owned());
        Ok(())
    }

    /// `-qmp`
    pub(super) fn qmp(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let text = props.required("address")?;
        let allowed = "allowed: unix:PATH, tcp:HOST:PORT";
        let address = if let Some(path) = text.strip_prefix("unix:") {
            MonitorAddress::Unix(socket_path(props, path)?)
        } else if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = rest
                .rsplit_once(':')
                .ok_or_else(|| props.error(format!("address {text} has no port; {allowed}")))?;
            let host = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'))
                .unwrap_or(host);
            let port = read_int(port)
                .and_then(|port| u16::try_from(port).ok())
                .ok_or_else(|| {
                    props.error(format!(
                        "port {port} is out of range; allowed: 0 to 65535, 0 for any that is free"
                    ))
                })?;
            // As elsewhere, no host is every address when listening; a control socket must say so itself.
            let host = if host.is_empty() { "localhost" } else { host };
            MonitorAddress::Tcp {
                host: host.to_owned(),
                port,
            }
        } else {
            return Err(props.error(format!("address {text} is not valid; {allowed}")));
        };
        let (server, nowait) = server_nowait(props)?;
        if let MonitorAddress::Tcp { port: 0, .. } = address
            && !server
        {
            return Err(props.error("port 0 is out of range; allowed without server: 1 to 65535"));
        }
        self.add_monitor(
            props,
            MonitorSpec {
                address,
                server,
                nowait,
            },
        )
    }

    pub(super) fn add_monitor(
        &mut self,
        props: &Props<'_>,
        monitor: MonitorSpec,
    ) -> Result<(), CmdlineError> {
        if self
            .spec
            .monitors
            .iter()
            .any(|other| other.address == monitor.address)
        {
            return Err(props.error("this address has a monitor already"));
        }
        if self.spec.monitors.len() + self.mon_args.len() == limits::MAX_MONITORS {
            return Err(props.error(format!(
                "one monitor too many; allowed: 0 to {}",
                limits::MAX_MONITORS
            )));
        }
        self.spec.monitors.push(monitor);
        Ok(())
    }

    /// `-mon`; its chardev may come later on the command line.
    pub(super) fn mon(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        if self.spec.monitors.len() + self.mon_args.len() == limits::MAX_MONITORS {
            return Err(props.error(format!(
                "one monitor too many; allowed: 0 to {}",
                limits::MAX_MONITORS
            )));
        }
        self.mon_args
            .push((props.raw().to_owned(), props.required("chardev")?));
        Ok(())
    }
}

/// `server` and `nowait`, which `wait` says the other way round.
fn server_nowait(props: &Props<'_>) -> Result<(bool, bool), CmdlineError> {
    let server = props.bool("server").unwrap_or(false);
    let (wait, nowait) = (props.bool("wait"), props.bool("nowait"));
    if wait.is_some() && wait == nowait {
        return Err(props.error("wait and nowait contradict each other"));
    }
    if !server && (wait.is_some() || nowait.is_some()) {
        return Err(props.error("nowait and wait need server"));
    }
    Ok((server, nowait.unwrap_or(wait == Some(false))))
}

fn socket_path(props: &Props<'_>, path: &str) -> Result<PathBuf, CmdlineError> {
    if !(1..=MAX_SOCKET_PATH).contains(&path.len()) {
        return Err(props.error(format!(
            "path of the socket has {} bytes; allowed: 1 to {MAX_SOCKET_PATH}",
            path.len()
        )));
    }
    Ok(PathBuf::from(path))
}

//! Policy files into structs. Unknown keys are errors; meaning is checked in `resolve`.

use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// One process's or thread's policy, as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicyFile {
    /// The process that the thread belongs to, as `ps` shows it.
    pub(crate) process: String,
    /// The thread, or `all` when one filter covers every thread of the process.
    pub(crate) thread: String,
    /// What the thread does, in one sentence.
    pub(crate) about: String,
    /// Names of shared pieces in `base/`.
    #[serde(default)]
    pub(crate) base: Vec<String>,
    /// Policies of processes that inherit this filter, and whose calls it must therefore admit.
    #[serde(default)]
    pub(crate) children: Vec<String>,
    /// Most distinct calls that the policy may allow; more is a build error. Answers are not counted.
    pub(crate) budget: usize,
    /// Why the budget is what it is, where that is not the figure that the kind of thread started with.
    pub(crate) budget_why: Option<String>,
    /// A device file of the host, without which nothing is ever under this policy: an audit judges it where there is one.
    pub(crate) needs: Option<PathBuf>,
    #[serde(default)]
    pub(crate) allow: Vec<Allow>,
    #[serde(default)]
    pub(crate) errno: Vec<Errno>,
}

/// A piece that several policies share.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BaseFile {
    /// What the piece is for.
    pub(crate) about: String,
    #[serde(default)]
    pub(crate) allow: Vec<Allow>,
    #[serde(default)]
    pub(crate) errno: Vec<Errno>,
}

/// A call that is let through, if all of its argument checks hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Allow {
    pub(crate) call: String,
    pub(crate) why: String,
    #[serde(default)]
    pub(crate) args: Vec<Arg>,
    /// Architectures that the rule is for; empty means all.
    #[serde(default)]
    pub(crate) only: Vec<String>,
    /// Why an audit may find the rule unused.
    pub(crate) rare: Option<Rare>,
}

/// A call that is answered with an error number instead of being made.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Errno {
    pub(crate) call: String,
    pub(crate) error: String,
    pub(crate) why: String,
    /// At most one check, of a dword for equality; without it every such call is answered.
    #[serde(default)]
    pub(crate) args: Vec<Arg>,
    /// As [`Allow::rare`].
    pub(crate) rare: Option<Rare>,
}

/// Why a run of all suites may leave a rule unused.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rare {
    pub(crate) takes: Takes,
    pub(crate) why: String,
    /// What makes the call all the same, where the audit does not see it: `folder/file::function`. `cargo xtask check` looks
    /// whether it is there.
    pub(crate) test: String,
}

/// What a rare call takes. Nothing else is a reason: a path that a test can take, a test has to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Takes {
    /// Another kind of host.
    Host,
    /// Several things at the same moment.
    Chance,
}

/// One check of one argument.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Arg {
    /// 0 to 5.
    pub(crate) index: u8,
    pub(crate) width: Width,
    pub(crate) op: Op,
    /// The bits that count, for `masked_eq`.
    pub(crate) mask: Option<Value>,
    /// Exactly one of `value` and `values`; several values mean any of them.
    pub(crate) value: Option<Value>,
    pub(crate) values: Option<Vec<Value>>,
}

/// How much of the argument the kernel looks at: `int` arguments are dwords, pointers, sizes and
/// `unsigned long` are qwords.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Width {
    Dword,
    Qword,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Op {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    MaskedEq,
}

/// A number, or names from `constants` joined with `|`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Value {
    Number(u64),
    Name(String),
}

/// All files of the policy folder, by file name without `.toml`.
#[derive(Debug, Default, Clone)]
pub(crate) struct Files {
    pub(crate) policies: BTreeMap<String, PolicyFile>,
    pub(crate) base: BTreeMap<String, BaseFile>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("cannot read {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a policy file: {source}")]
    Toml {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
}

/// Reads `folder/*.toml` and `folder/base/*.toml`.
pub(crate) fn read_folder(folder: &Path) -> Result<Files, ReadError> {
    Ok(Files {
        policies: read_all(folder)?,
        base: read_all(&folder.join("base"))?,
    })
}

fn read_all<T: for<'de> Deserialize<'de>>(folder: &Path) -> Result<BTreeMap<String, T>, ReadError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ReadError::Io { path, source }
    };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let value = toml::from_str(&text).map_err(|source| ReadError::Toml {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let stem = path.file_stem().unwrap_or_default();
        found.insert(stem.to_string_lossy().into_owned(), value);
    }
    Ok(found)
}

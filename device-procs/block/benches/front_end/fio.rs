//! # The floor
//!
//! **Job.** fio's io_uring engine with the same load on the plain file. **Who is not trusted.** Nobody.
//! **Why this way.** No ring, no process and no copy lies between it and the file: a back end cannot be faster for long.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::loads::Load;
use crate::options::Options;

/// One turn of fio.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floor {
    /// Requests per second.
    pub(crate) rate: f64,
    /// Median of the time of a request in microseconds, submission included.
    pub(crate) median: f64,
}

pub(crate) fn run(file: &Path, load: &Load, options: &Options) -> Floor {
    let direction = match (load.random, load.write) {
        (true, false) => "randread",
        (true, true) => "randwrite",
        (false, false) => "read",
        (false, true) => "write",
    };
    let output = Command::new("fio")
        .args(["--name=floor", "--ioengine=io_uring", "--time_based"])
        .args(["--output-format=json", "--group_reporting", "--thread"])
        .args(["--invalidate=0", "--norandommap", "--randrepeat=0"])
        .args(["--lat_percentiles=1", "--clat_percentiles=0"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={}", options.bytes()))
        .arg(format!("--rw={direction}"))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--numjobs={}", load.queues))
        .arg(format!("--direct={}", u8::from(options.direct)))
        .arg(format!("--runtime={}ms", options.slice.as_millis()))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "fio: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let job = &told["jobs"][0][if load.write { "write" } else { "read" }];
    Floor {
        rate: job["iops"].as_f64().unwrap(),
        median: job["lat_ns"]["percentile"]["50.000000"].as_f64().unwrap() / 1000.0,
    }
}

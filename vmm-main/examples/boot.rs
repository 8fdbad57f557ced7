//! Boots a kernel on the bare machine: no broker, no devices but the platform's, no jail. Serial output goes to
//! stdout. For trying the machine itself; the product is `stratovirt`.
//!
//! ```text
//! boot KERNEL [--initrd FILE] [--append LINE] [--smp N] [--mem MIB] [--pvh | --linux64] [--resets N]
//!      [--window] [--phases]
//! ```
//! `--resets N` performs the first N resets that the guest asks for; a later one ends the run. `--window` puts a device
//! with a wrong magic number behind the first mmio window, so that the guest's log shows whether it looked there.
//! `--phases` tells how long each step of the start took. Status: 0 power-off, 3 reset, 1 all else.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_main::boot::{BootSource, Protocol};
use vmm_main::kvm::cpuid::CpuFeatures;
use vmm_main::kvm::run::ThreadStart;
use vmm_main::kvm::{Kvm, Topology, Vm};
use vmm_main::machine::bus::BusDevice;
use vmm_main::machine::events::VmEvent;
use vmm_main::machine::microvm::{Microvm, MicrovmConfig};
use vmm_main::memory::{GuestRam, RamConfig};
use vmm_main::platform::serial::SerialSink;

struct Stdout;

impl SerialSink for Stdout {
    fn push(&mut self, bytes: &[u8]) {
        // Nothing useful can be done when the reader is gone.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

/// Reads as something that is no virtio device.
struct Window;

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == 0 { 0x2A } else { 0 });
    }
    fn write(&mut self, _: u64, _: &[u8]) {}
}

struct Arguments {
    kernel: String,
    initrd: Option<String>,
    append: String,
    cpus: u32,
    mib: u64,
    protocol: Protocol,
    resets: u32,
    window: bool,
    phases: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut list = std::env::args().skip(1);
    let mut parsed = Arguments {
        kernel: list.next().ok_or("the kernel's file name is missing")?,
        initrd: None,
        append: String::new(),
        cpus: 1,
        mib: 256,
        protocol: Protocol::Auto,
        resets: 0,
        window: false,
        phases: false,
    };
    while let Some(option) = list.next() {
        let mut value = || list.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--initrd" => parsed.initrd = Some(value()?),
            "--append" => parsed.append = value()?,
            "--smp" => parsed.cpus = value()?.parse().map_err(|e| format!("--smp: {e}"))?,
            "--mem" => parsed.mib = value()?.parse().map_err(|e| format!("--mem: {e}"))?,
            "--resets" => parsed.resets = value()?.parse().map_err(|e| format!("--resets: {e}"))?,
            "--pvh" => parsed.protocol = Protocol::Pvh,
            "--linux64" => parsed.protocol = Protocol::Linux64,
            "--window" => parsed.window = true,
            "--phases" => parsed.phases = true,
            _ => return Err(format!("unknown option {option}")),
        }
    }
    Ok(parsed)
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let arguments = arguments()?;
    let begin = Instant::now();
    let mut last = begin;
    let mut phase = |name: &str| {
        let now = Instant::now();
        if arguments.phases {
            eprintln!("{name:>12} {:7.0} us", (now - last).as_secs_f64() * 1e6);
        }
        last = now;
    };
    let kvm = Kvm::open()?;
    phase("open");
    let vm = Vm::create(&kvm)?;
    phase("create vm");
    let ram = Arc::new(GuestRam::new(RamConfig::new(arguments.mib << 20))?);
    phase("ram");
    let config = MicrovmConfig {
        topology: Topology::flat(arguments.cpus)?,
        features: CpuFeatures::default(),
        serial: Some(Box::new(Stdout)),
    };
    let mut machine = Microvm::new(&kvm, vm, ram, config)?;
    phase("machine");
    if arguments.window {
        let slot = machine.attach_mmio(0, Arc::new(Mutex::new(Window)))?;
        eprintln!("window at {:#x}, line {}", slot.base, slot.gsi);
    }
    let loaded = machine.load(BootSource {
        kernel: File::open(&arguments.kernel)?,
        initrd: arguments.initrd.map(File::open).transpose()?,
        cmdline: arguments.append,
        protocol: arguments.protocol,
    })?;
    phase("load");
    let on_start: ThreadStart = Arc::new(|_| Ok(()));
    machine.start(&on_start)?;
    let events = machine.take_events().ok_or("events are taken")?;
    machine.resume()?;
    phase("start");
    if arguments.phases {
        eprintln!("{loaded:x?}, vCPU threads {:?}", machine.vcpu_thread_ids()?);
    }
    let mut resets = arguments.resets;
    loop {
        match events.recv() {
            Some(VmEvent::Reset) if resets > 0 => {
                resets -= 1;
                let begin = Instant::now();
                machine.reset()?;
                eprintln!("reset in {:.0} us", begin.elapsed().as_secs_f64() * 1e6);
                machine.resume()?;
            }
            Some(event) => {
                eprintln!("{event}");
                return Ok(match event {
                    VmEvent::Shutdown => ExitCode::SUCCESS,
                    VmEvent::Reset => ExitCode::from(3),
                    _ => ExitCode::FAILURE,
                });
            }
            None => return Err("the machine is gone".into()),
        }
    }
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprint!("boot: {error}");
        let mut cause = error.source();
        while let Some(inner) = cause {
            eprint!(": {inner}");
            cause = inner.source();
        }
        eprintln!();
        ExitCode::FAILURE
    })
}

//! Boots a kernel on the bare machine: no broker, no devices but the platform's, no jail. Serial output goes to
//! stdout. For trying the machine itself; the product is `stratovirt`.
//!
//! ```text
//! boot KERNEL [--initrd FILE] [--append LINE] [--smp N] [--mem MIB] [--pvh | --linux64] [--resets N]
//!      [--topology S,D,L,C,T] [--button TEXT] [--seconds N] [--window] [--phases]
//! ```
//! `--resets N` performs the first N resets that the guest asks for; a later one ends the run. `--topology` gives
//! sockets, dies, clusters, cores and threads. `--button` presses the power button when the guest has printed TEXT.
//! `--seconds` ends a guest that runs longer and prints its registers. `--window` puts a device
//! with a wrong magic number behind the first mmio window, so that the guest's log shows whether it looked there.
//! `--phases` tells how long each step of the start took. Status: 0 power-off, 3 reset, 1 all else.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use vmm_main::boot::{BootSource, Protocol};
use vmm_main::kvm::cpuid::CpuFeatures;
use vmm_main::kvm::run::ThreadStart;
use vmm_main::kvm::{Kvm, Topology, Vm};
use vmm_main::machine::bus::BusDevice;
use vmm_main::machine::events::VmEvent;
use vmm_main::machine::microvm::{Microvm, MicrovmConfig};
use vmm_main::memory::{GuestRam, RamConfig};
use vmm_main::platform::serial::SerialSink;

struct Stdout {
    /// Text to wait for, what came since the last line's end, and where to tell.
    awaited: Option<(String, String, mpsc::Sender<()>)>,
}

impl SerialSink for Stdout {
    fn push(&mut self, bytes: &[u8]) {
        if let Some((text, line, found)) = &mut self.awaited {
            line.push_str(&String::from_utf8_lossy(bytes));
            if line.contains(text.as_str()) {
                let _ = found.send(());
                self.awaited = None;
            } else if line.ends_with('\n') {
                line.clear();
            }
        }
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
    topology: Option<[u32; 5]>,
    button: Option<String>,
    seconds: Option<u64>,
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
        topology: None,
        button: None,
        seconds: None,
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
            "--topology" => {
                let levels: Result<Vec<u32>, _> = value()?.split(',').map(str::parse).collect();
                let levels = levels.map_err(|e| format!("--topology: {e}"))?;
                parsed.topology = Some(
                    levels
                        .try_into()
                        .map_err(|_| "--topology needs five numbers")?,
                );
            }
            "--button" => parsed.button = Some(value()?),
            "--seconds" => {
                parsed.seconds = Some(value()?.parse().map_err(|e| format!("--seconds: {e}"))?);
            }
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
    let (pressed, press) = mpsc::channel();
    let awaited = arguments.button.map(|text| (text, String::new(), pressed));
    let config = MicrovmConfig {
        topology: match arguments.topology {
            None => Topology::flat(arguments.cpus)?,
            Some([s, d, l, c, t]) => Topology::new(arguments.cpus, s, d, l, c, t)?,
        },
        features: CpuFeatures::default(),
        serial: Some(Box::new(Stdout { awaited })),
        numa: None,
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
    let button = machine.power_button_handle();
    let _presser = std::thread::spawn(move || {
        // Ends when the sink is dropped or has found its text.
        if press.recv().is_ok() {
            eprintln!("pressing the power button: {:?}", button.press());
        }
    });
    let deadline = arguments
        .seconds
        .map(|seconds| begin + Duration::from_secs(seconds));
    loop {
        let event = match deadline {
            Some(deadline) => events.recv_until(deadline),
            None => events.recv(),
        };
        match event {
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
            None => {
                machine.pause()?;
                for dump in machine.registers()? {
                    eprintln!("{dump}");
                }
                return Err("the guest is still running".into());
            }
        }
    }
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("boot: {}", ipc::log::with_causes(error.as_ref()));
        ExitCode::FAILURE
    })
}

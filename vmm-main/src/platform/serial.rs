//! The first serial port: a 16550A at 0x3f8, line 4.
//!
//! Job: take the guest's output to a [`SerialSink`] and bring input to its FIFO.
//! Who is not trusted: the guest may write without end and never read; the input's origin may send without end.
//! Why this way: the UART is vm-superio's. Output is pushed byte by byte as the guest writes it, because a console
//! must show a line that a crash follows. Input is refused when the FIFO is full, and the refusing side is told when
//! there is room again, so no byte is dropped and no buffer grows.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Serial, SerialEvents};
use vm_superio::{SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::bus::BusDevice;

/// Where the guest's output goes. Called on vCPU threads.
pub trait SerialSink: Send {
    /// Takes bytes. Must not block: a sink whose reader is slow buffers or drops.
    fn push(&mut self, bytes: &[u8]);
}

/// A sink that forgets everything, for a guest without console.
#[derive(Debug, Default, Clone, Copy)]
pub struct NullSink;

impl SerialSink for NullSink {
    fn push(&mut self, _: &[u8]) {}
}

struct SinkWriter(Box<dyn SerialSink>);

impl Write for SinkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input side that the guest emptied the FIFO, if it was told before to wait.
struct RoomSignal {
    event: EventFd,
    wanted: std::sync::atomic::AtomicBool,
}

impl SerialEvents for RoomSignal {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self
            .wanted
            .swap(false, std::sync::atomic::Ordering::Relaxed)
        {
            // Fails only when the counter is about to overflow, and then it is readable already.
            let _ = self.event.write(1);
        }
    }
}

type Uart = Serial<Line, Arc<RoomSignal>, SinkWriter>;

/// The serial port. Cheap to clone: clones are the same port.
#[derive(Clone)]
pub struct SerialPort {
    uart: Arc<Mutex<Option<Uart>>>,
    room: Arc<RoomSignal>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort")
            .field("room", &self.input_room())
            .finish_non_exhaustive()
    }
}

/// The host's side of a serial port's input.
#[derive(Debug, Clone)]
pub struct SerialInput(SerialPort);

/// The registers of a 16550 in a snapshot, and what waits to be read from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialRegisters {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl SerialPort {
    /// A port that raises `line` (an irqfd) and sends its output to `sink`.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(line: EventFd, sink: Box<dyn SerialSink>) -> io::Result<Self> {
        let room = Arc::new(RoomSignal {
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            wanted: std::sync::atomic::AtomicBool::new(false),
        });
        let uart = Serial::with_events(Line(Arc::new(line)), room.clone(), SinkWriter(sink));
        Ok(Self {
            uart: Arc::new(Mutex::new(Some(uart))),
            room,
        })
    }

    /// The input side.
    #[must_use]
    pub fn input(&self) -> SerialInput {
        SerialInput(self.clone())
    }

    /// What a snapshot holds of it. Output is not part of it: the sink has taken all of that.
    pub(crate) fn save(&self) -> Option<SerialRegisters> {
        let state = self.lock().as_ref()?.state();
        Some(SerialRegisters {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        })
    }

    /// Goes on from a snapshot; `false` if it holds more input than a port has room for.
    pub(crate) fn restore(&mut self, registers: &SerialRegisters) -> bool {
        let state = SerialState {
            baud_divisor_low: registers.divisor[0],
            baud_divisor_high: registers.divisor[1],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.input.clone(),
        };
        self.set(&state)
    }

    /// Another UART on the same line and sink; `false` if there cannot be one in that state.
    fn set(&mut self, state: &SerialState) -> bool {
        let mut guard = self.lock();
        if let Some(uart) = guard.take() {
            let line = uart.interrupt_evt().clone();
            let sink = uart.into_writer();
            *guard = Serial::from_state(state, line, self.room.clone(), sink).ok();
        }
        guard.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Uart>> {
        // A panic aborts the process, so a poisoned lock cannot be seen.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn input_room(&self) -> usize {
        self.lock().as_ref().map_or(0, Serial::fifo_capacity)
    }
}

impl SerialInput {
    /// Bytes that [`Self::push`] would take now (at most 64). When 0, [`Self::room_event`] becomes readable as soon as
    /// the guest has emptied the FIFO.
    #[must_use]
    pub fn room(&self) -> usize {
        let room = self.0.input_room();
        if room == 0 {
            self.want_room();
        }
        // The guest may have read in between: look again, so that no wake-up is lost.
        if room == 0 { self.0.input_room() } else { room }
    }

    /// Puts bytes into the FIFO; returns how many fitted. The rest is the caller's to keep; see [`Self::room`].
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut guard = self.0.lock();
        let Some(uart) = guard.as_mut() else { return 0 };
        // An error is a full FIFO, or an interrupt line whose eventfd would overflow and so is raised already.
        let before = uart.fifo_capacity();
        let taken = match uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(_) => before - uart.fifo_capacity(),
        };
        if taken < bytes.len() {
            self.want_room();
        }
        taken
    }

    /// Readable once after the FIFO was full and has been emptied. Read it, then push again.
    #[must_use]
    pub fn room_event(&self) -> &EventFd {
        &self.0.room.event
    }

    fn want_room(&self) {
        self.0
            .room
            .wanted
            .store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // All registers are one byte wide; wider reads see a floating bus.
        if let ([byte], Ok(offset)) = (&mut *data, u8::try_from(offset)) {
            *byte = self.lock().as_mut().map_or(0xFF, |uart| uart.read(offset));
        } else {
            data.fill(0xFF);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Some(uart) = self.lock().as_mut()
        {
            // The only errors are those of the line's eventfd (raised already) and of the loop-back FIFO (full, as a
            // real UART overruns).
            let _ = uart.write(offset, *byte);
        }
    }

    fn reset(&mut self) {
        // Cannot fail: a new UART has no input and raises nothing.
        self.set(&SerialState::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Channel(std::sync::mpsc::Sender<u8>);
    impl SerialSink for Channel {
        fn push(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0.send(*byte).unwrap();
            }
        }
    }

    fn port() -> (SerialPort, EventFd, std::sync::mpsc::Receiver<u8>) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        (
            SerialPort::new(line.try_clone().unwrap(), Box::new(Channel(sender))).unwrap(),
            line,
            receiver,
        )
    }

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_sink_byte_by_byte() {
        let (mut port, _line, output) = port();
        for byte in b"hi\n" {
            port.write(0, &[*byte]);
        }
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"hi\n");
        port.reset();
        port.write(0, b"x");
        assert_eq!(output.try_recv(), Ok(b'x'), "the sink outlives a reset");
    }

    #[test]
    fn full_fifo_pushes_back_and_tells_when_there_is_room() {
        let (mut port, line, _output) = port();
        port.write(1, &[1]); // interrupt on received data
        let input = port.input();
        assert_eq!(
            (input.room(), input.push(&[7; 100]), input.room()),
            (64, 64, 0)
        );
        assert!(line.read().is_ok(), "received data raises the line");
        assert_eq!(input.push(b"x"), 0);
        assert!(input.room_event().read().is_err());
        for _ in 0..64 {
            assert_eq!(read(&mut port, 0), 7);
        }
        assert_eq!(input.room_event().read().unwrap(), 1);
        assert_eq!(input.room(), 64);
    }

    #[test]
    fn wide_accesses_do_not_reach_the_registers() {
        let (mut port, _line, output) = port();
        port.write(0, b"ab");
        let mut word = [0; 2];
        port.read(5, &mut word);
        assert_eq!(word, [0xFF; 2]);
        assert!(output.try_recv().is_err());
    }
}

//! The CMOS real-time clock: an MC146818 at ports 0x70 and 0x71.
//!
//! Job: the time of day (UTC) with century, settable, and the status registers that kernels check before they believe
//! it.
//! Who is not trusted: the guest; it may set its own clock to anything, which changes an offset here and nothing on
//! the host.
//! Why this way: no timer runs. The time is computed from the host's clock when a register is read, so "update in
//! progress" is never set; a kernel that reads across a second's end sees the seconds change and reads again. Alarm
//! and periodic interrupts are not offered (the DSDT gives the clock no line); kernels use the LAPIC timer.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::machine::bus::BusDevice;

const INDEX: u64 = 0;
const DATA: u64 = 1;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const STATUS_C: u8 = 0x0C;
const STATUS_D: u8 = 0x0D;
/// Where PC firmware keeps the century; the FADT's `CENTURY` field says so.
pub const CENTURY: u8 = 0x32;

/// Status A: 32,768 Hz time base, 1,024 Hz rate; what firmware leaves.
const STATUS_A_DEFAULT: u8 = 0x26;
/// Status B: 24-hour mode, BCD.
const STATUS_B_DEFAULT: u8 = 0x02;
const STATUS_B_HALT: u8 = 0x80;
const STATUS_B_BINARY: u8 = 0x04;
const STATUS_B_24H: u8 = 0x02;
/// Status D: the battery is good, so the time is valid.
const STATUS_D_VALID: u8 = 0x80;
/// Bit of the 12-hour mode's hours.
const PM: u8 = 0x80;

const DAY_SECONDS: i64 = 86_400;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Civil {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// Proleptic Gregorian date of seconds since 1970, by eras of 400 years that start in March.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY_SECONDS) + 719_468;
        let time = seconds.rem_euclid(DAY_SECONDS);
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        // All below fit: month 1..=12, day 1..=31, and parts of a day.
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * shifted_month + 2) / 5 + 1) as u8,
            hour: (time / 3_600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// Inverse of [`Self::from_unix`]; out-of-range fields carry over, as `mktime` does.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.max(1)) - 1;
        let year = self.year + month / 12 - i64::from(month % 12 < 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((month % 12 + 10) % 12) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * DAY_SECONDS
            + i64::from(self.hour) * 3_600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// Whether its year is one that a guest can have set.
    fn is_near(&self) -> bool {
        (0..20_000).contains(&self.year)
    }

    /// 1 = Sunday.
    fn weekday(self) -> u8 {
        ((self.to_unix().div_euclid(DAY_SECONDS) + 4).rem_euclid(7) + 1) as u8
    }
}

fn host_now() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs().cast_signed(),
        Err(before) => -before.duration().as_secs().cast_signed(),
    }
}

/// The clock and its battery-backed memory.
#[derive(Debug)]
pub struct Rtc {
    now: fn() -> i64,
    /// Guest's time minus the host's, in seconds.
    offset: i64,
    /// While the guest holds the clock (status B bit 7): the date it is assembling.
    held: Option<Civil>,
    index: u8,
    memory: [u8; 128],
}

/// The clock in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    offset: i64,
    held: Option<Civil>,
    index: u8,
    memory: Vec<u8>,
}

/// Farthest that a guest's clock is from the host's, in seconds: the chip counts a hundred centuries.
const MAX_OFFSET: i64 = 10_000 * 366 * DAY_SECONDS;

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(host_now)
    }
}

impl Rtc {
    fn with_clock(now: fn() -> i64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        memory[usize::from(STATUS_B)] = STATUS_B_DEFAULT;
        Self {
            now,
            offset: 0,
            held: None,
            index: 0,
            memory,
        }
    }

    /// What a snapshot holds of the clock: how far the guest's is from the host's, and what the guest keeps in it. After a
    /// restore it shows the time of day, not the time of the snapshot.
    pub(crate) fn save(&self) -> RtcState {
        RtcState {
            offset: self.offset,
            held: self.held,
            index: self.index,
            memory: self.memory.to_vec(),
        }
    }

    /// Goes on from a snapshot. Whatever it says, reads and writes of the guest are within bounds.
    pub(crate) fn restore(&mut self, state: &RtcState) {
        self.offset = state.offset.clamp(-MAX_OFFSET, MAX_OFFSET);
        self.held = state.held.filter(Civil::is_near);
        self.index = state.index & 0x7F;
        for (to, from) in self.memory.iter_mut().zip(&state.memory) {
            *to = *from;
        }
    }

    fn status_b(&self) -> u8 {
        self.memory[usize::from(STATUS_B)]
    }

    fn date(&self) -> Civil {
        self.held
            .unwrap_or_else(|| Civil::from_unix((self.now)() + self.offset))
    }

    fn set_date(&mut self, date: Civil) {
        if self.held.is_some() {
            self.held = Some(date);
        } else {
            self.offset = date.to_unix() - (self.now)();
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xF)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & STATUS_B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) {
            12
        } else {
            hour % 12
        };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_24H != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn read_register(&self) -> u8 {
        let date = self.date();
        match self.index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(date.weekday()),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100) as u8),
            // Always BCD, whatever status B says: the cell is firmware's, not the chip's.
            CENTURY => {
                let century = date.year.div_euclid(100).rem_euclid(100) as u8;
                ((century / 10) << 4) | (century % 10)
            }
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    fn write_register(&mut self, value: u8) {
        let mut date = self.date();
        let decoded = self.decode(value);
        match self.index {
            SECONDS => date.second = decoded,
            MINUTES => date.minute = decoded,
            HOURS => date.hour = self.decode_hour(value),
            DAY => date.day = decoded,
            MONTH => date.month = decoded,
            YEAR => date.year = date.year.div_euclid(100) * 100 + i64::from(decoded),
            CENTURY => {
                let century = i64::from((value >> 4) * 10 + (value & 0xF));
                date.year = century * 100 + date.year.rem_euclid(100);
            }
            STATUS_B => {
                self.memory[usize::from(STATUS_B)] = value;
                match (value & STATUS_B_HALT != 0, self.held) {
                    (true, None) => self.held = Some(date),
                    (false, Some(held)) => {
                        self.held = None;
                        self.set_date(held);
                    }
                    _ => {}
                }
                return;
            }
            WEEKDAY | STATUS_C | STATUS_D => return,
            index => {
                self.memory[usize::from(index)] = value;
                return;
            }
        }
        self.set_date(date);
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let (DATA, [byte]) = (offset, data) {
            *byte = self.read_register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Bit 7 masks NMIs on old boards.
            (INDEX, [byte]) => self.index = byte & 0x7F,
            (DATA, [byte]) => self.write_register(*byte),
            _ => {}
        }
    }

    /// The battery keeps time and memory; what a reset clears are the modes.
    fn reset(&mut self) {
        if let Some(held) = self.held.take() {
            self.set_date(held);
        }
        self.index = 0;
        self.memory[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        self.memory[usize::from(STATUS_B)] = STATUS_B_DEFAULT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-21 03:04:05 UTC, a Saturday.
    fn fixed() -> i64 {
        1_795_230_245
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(INDEX, &[index | 0x80]);
        let mut byte = [0];
        rtc.read(DATA, &mut byte);
        byte[0]
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(INDEX, &[index]);
        rtc.write(DATA, &[value]);
    }

    #[test]
    fn reads_the_date_in_bcd() {
        let mut rtc = Rtc::with_clock(fixed);
        let registers = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY];
        assert_eq!(
            registers.map(|index| get(&mut rtc, index)),
            [0x20, 0x26, 0x11, 0x21, 0x03, 0x04, 0x05, 0x07]
        );
        assert_eq!(
            [STATUS_A, STATUS_B, STATUS_C, STATUS_D].map(|i| get(&mut rtc, i)),
            [0x26, 0x02, 0, 0x80]
        );
    }

    #[test]
    fn twelve_hour_and_binary_modes() {
        let mut rtc = Rtc::with_clock(|| fixed() + 12 * 3600);
        set(&mut rtc, STATUS_B, 0);
        assert_eq!(get(&mut rtc, HOURS), 0x83);
        set(&mut rtc, STATUS_B, STATUS_B_BINARY | STATUS_B_24H);
        assert_eq!((get(&mut rtc, HOURS), get(&mut rtc, DAY)), (15, 21));
    }

    #[test]
    fn a_guest_sets_its_clock_and_a_reset_keeps_it() {
        let mut rtc = Rtc::with_clock(fixed);
        // As Linux does: hold, write all, release.
        set(&mut rtc, STATUS_B, STATUS_B_DEFAULT | STATUS_B_HALT);
        for (index, value) in [
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
            (CENTURY, 0x19),
        ] {
            set(&mut rtc, index, value);
        }
        set(&mut rtc, STATUS_B, STATUS_B_DEFAULT);
        assert_eq!(rtc.offset + fixed(), 946_684_798);
        rtc.reset();
        assert_eq!(
            (
                get(&mut rtc, CENTURY),
                get(&mut rtc, YEAR),
                get(&mut rtc, SECONDS)
            ),
            (0x19, 0x99, 0x58)
        );
    }

    #[test]
    fn dates_convert_both_ways() {
        for (seconds, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (4_107_542_400, (2100, 3, 1)),
            (-86_400, (1969, 12, 31)),
        ] {
            let date = Civil::from_unix(seconds);
            assert_eq!((date.year, date.month, date.day), expected);
            assert_eq!(date.to_unix(), seconds);
        }
        for seconds in (0..4_000_000_000i64).step_by(40_000_003) {
            assert_eq!(Civil::from_unix(seconds).to_unix(), seconds);
        }
    }

    #[test]
    fn nonsense_from_the_guest_is_harmless() {
        let mut rtc = Rtc::with_clock(fixed);
        for index in 0..=127 {
            for value in [0, 0x7F, 0xFF] {
                set(&mut rtc, index, value);
                get(&mut rtc, index);
            }
        }
    }
}

//! Writes the first inputs of each target to `DIR/seeds/TARGET`, and words of its language to `DIR/dictionaries/TARGET`.

use std::fs;
use std::io::Result;
use std::path::PathBuf;

fn main() -> Result<()> {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: seeds DIR");
        std::process::exit(2);
    };
    for (target, inputs) in targets::seeds::all() {
        let place = dir.join("seeds").join(target);
        fs::create_dir_all(&place)?;
        for (number, input) in inputs.iter().enumerate() {
            fs::write(place.join(format!("{number:03}")), input)?;
        }
    }
    let place = dir.join("dictionaries");
    fs::create_dir_all(&place)?;
    for (target, words) in targets::seeds::words() {
        let lines: Vec<String> = words
            .iter()
            .map(|word| {
                // libFuzzer's quoting.
                let quoted: String = word.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
                format!("\"{quoted}\"\n")
            })
            .collect();
        fs::write(place.join(target), lines.concat())?;
    }
    Ok(())
}

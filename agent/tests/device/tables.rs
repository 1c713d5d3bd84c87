//! Layers that older edgeds unpacked lie beside today's, in one image: each is checked as well as it can be, and what cannot be
//! checked is said to be so.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::images::find;
use crate::rig::{Device, Factory, rot, sleeper, until};

/// How a layer's table was written: by the first edged, before there were any; by the first with tables, which wrote down the
/// time of the layer's own directory; by those before fs-verity, as today's without it; and where there was fs-verity, for a
/// device that has it no more.
const WRITERS: [&str; 4] = ["none", "first", "plain", "verity"];
const FILE_BYTES: usize = 300_000;

fn file(writer: &str) -> String {
    format!("opt/{writer}")
}

fn table_of(device: &Device, layer: &Path) -> PathBuf {
    device.data().join("content/tables").join(layer.file_name().unwrap())
}

fn layer_of(device: &Device, writer: &str) -> PathBuf {
    find(device, &file(writer)).ancestors().nth(2).unwrap().to_owned()
}

/// As that edged would have written it.
fn write_as(device: &Device, writer: &str) {
    let layer = layer_of(device, writer);
    let table = table_of(device, &layer);
    let text = fs::read_to_string(&table).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let end = lines.pop().unwrap();
    match writer {
        "none" => return fs::remove_file(&table).unwrap(),
        "first" => {
            let meta = fs::metadata(&layer).unwrap();
            let mut fields: Vec<String> = lines[0].split('\t').map(str::to_owned).collect();
            fields[1].push_str(&format!(" {}.{:09}", meta.mtime() - 7, meta.mtime_nsec()));
            lines[0] = fields.join("\t");
        }
        "verity" => {
            let line = lines.iter_mut().find(|line| line.starts_with("./opt/verity\t")).unwrap();
            line.push_str(&format!("\t{}", "ab".repeat(32)));
        }
        _ => {}
    }
    let all: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let count = end.split('\t').nth(1).unwrap();
    let sum = twox_hash::XxHash64::oneshot(0, all.as_bytes());
    fs::write(&table, format!("{all}end\t{count}\t{sum:016x}\n")).unwrap();
}

/// The power is cut and comes back; what the check then says.
fn after_a_cut(factory: &Factory, device: Device, harm: impl FnOnce()) -> (Device, String) {
    let data = device.data().to_owned();
    let checks = |device: &Device| -> Vec<String> {
        device.events().into_iter().filter(|text| text.contains("after an unclean stop")).collect()
    };
    let before = checks(&device).len();
    device.switch_off();
    fs::write(data.join("content/in-use"), "another boot").unwrap();
    harm();
    let device = factory.device("");
    let told = until("the check", || checks(&device).into_iter().nth(before));
    device.running("app");
    (device, told)
}

#[test]
fn tables_of_every_age_lie_beside_each_other_and_each_is_taken_for_what_it_says() {
    let factory = Factory::start();
    let own: Vec<PathBuf> = WRITERS
        .iter()
        .map(|writer| {
            let own = factory.path(writer);
            fs::create_dir_all(own.join("opt")).unwrap();
            fs::write(own.join(file(writer)), vec![7; FILE_BYTES]).unwrap();
            own
        })
        .collect();
    let image = factory.publish_all_over_busybox("app", &own);
    let device = factory.device("");
    device.take(&factory.sign("one", &sleeper(1, &image)));
    device.wait_for_generation(1, "good");
    for writer in WRITERS {
        write_as(&device, writer);
    }
    let (mut device, told) = after_a_cut(&factory, device, || {});
    assert!(told.contains("5 layers") && told.contains(": 0 damaged; 1 of them not in full"), "{told}");
    let said = device.ask(&["image", "check"]);
    assert_eq!(said.matches("not all was read").count(), 1, "{said}");
    assert_eq!(said.matches("as unpacked").count(), 4, "{said}");

    for writer in WRITERS {
        let path = layer_of(&device, writer).join(file(writer));
        let others: Vec<_> = WRITERS.iter().filter(|other| **other != writer).collect();
        let inodes = |device: &Device| -> Vec<u64> {
            others.iter().map(|other| fs::metadata(layer_of(device, other)).unwrap().ino()).collect()
        };
        let before = inodes(&device);
        let (next, told) = after_a_cut(&factory, device, || rot(&path));
        device = next;
        let damaged = |device: &Device| {
            device
                .events()
                .into_iter()
                .filter(|text| text.contains(&format!("./opt/{writer} has another content")))
                .count()
        };
        let bytes = fs::read(&path).unwrap();
        if writer == "none" {
            // Nobody can know; that is said each time.
            assert!(told.contains(": 0 damaged; 1 of them not in full"), "{told}");
            assert_eq!((damaged(&device), bytes[50_000]), (0, 8));
        } else {
            assert!(told.contains(": 1 damaged; 1 of them not in full"), "{writer}: {told}");
            assert_eq!((damaged(&device), bytes == vec![7; FILE_BYTES]), (1, true), "{writer}");
            // What came again has a table of today.
            let table = fs::read_to_string(table_of(&device, &layer_of(&device, writer))).unwrap();
            assert!(table.starts_with(".\t") && table.contains(&format!("./opt/{writer}\t")), "{table}");
            assert_eq!(table.lines().next().unwrap().split('\t').nth(1).unwrap().split(' ').count(), 3, "{table}");
        }
        assert_eq!(inodes(&device), before, "{writer}: nothing else was fetched");
    }
}

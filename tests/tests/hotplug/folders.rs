//! Folders of daemons that were there before.

use std::fs;

use serde_json::json;
use tests::daemon::Daemon;
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::test_path;
use tests::vm::{Vm, expect};

use super::{LIMIT, ends_well, load_worked, md5, plug, refused, run, unplug};

/// What the guest does with a folder that comes and goes. `poll` waits, as a guest without udev has to.
const FOLDER_SCRIPT: &str = r#"
set -e
poll() { until eval "$1"; do usleep 20000; done; }
mkdir -p /f
i=0
echo READY
while read what && [ "$what" = go ]; do
  poll 'mount -t virtiofs share /f 2>/dev/null'
  (
    n=0
    while [ ! -e /stop ]; do
      dd if=/dev/urandom of=/tmp-load bs=16k count=8 2>/dev/null
      cp /tmp-load /f/load; sync; echo 3 > /proc/sys/vm/drop_caches
      cmp /tmp-load /f/load || { echo LOAD-WRONG; exit 1; }
      n=$((n+1)); echo $n > /rounds
    done
  ) &
  load=$!
  poll '[ -s /rounds ]'
  dd if=/dev/urandom of=/f/round-$i bs=64k count=16 conv=fsync 2>/dev/null
  echo 3 > /proc/sys/vm/drop_caches
  echo FOLDER $(cat /f/name) $(md5sum < /f/round-$i | cut -d' ' -f1)
  read what
  touch /stop; wait $load; rm /stop
  umount /f
  echo LOADED $(cat /rounds)
  rm /rounds
  read what
  i=$((i+1))
done
dmesg | grep -i -E 'error|warn|BUG|stall|fail' | grep -v -i -E 'correctable|EBUSY|RAS:' || true
echo SCRIPT-END
"#;

/// A folder of a daemon that was there before: by a chardev that is added and removed, and by one of the command line that no
/// device of it uses, each of them more than once and with another daemon each time.
#[test]
fn a_stock_kernel_uses_folders_of_daemons_that_come_and_go() {
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sockets")).unwrap();
        let initrd = guest.initrd_with(&Script::new(FOLDER_SCRIPT)).unwrap();
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-m", "256"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .arg("-chardev")
            .arg(format!(
                "socket,id=cold,path={},server,nowait",
                at("cold").display()
            ))
            .arg("-hotplug")
            .arg(format!("sockets={}", at("sockets").display()))
            .with_qmp()
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        expect(&mut vm, "READY");
        let mut sums = Vec::new();
        for round in 0..4 {
            let tree = at(&format!("tree-{round}"));
            fs::create_dir(&tree).unwrap();
            fs::write(tree.join("name"), format!("tree-{round}")).unwrap();
            let cold = round % 2 == 0;
            let (chardev, socket) = if cold {
                ("cold", at("cold"))
            } else {
                ("hot", at("sockets/hot"))
            };
            let device = json!({
                "id": "folder", "driver": "vhost-user-fs-device", "chardev": chardev, "tag": "share", "addr": "0x0",
            });
            if cold {
                // Nobody listens yet, or any more.
                let why = refused(&mut qmp, "device_add", device.clone());
                assert!(why.contains("-chardev id=cold"), "{why}");
            }
            let program = tests::vm::binary("vhost_user_fs").unwrap();
            let mut daemon = Daemon::sharing(&program, &tree, &socket, &[]).unwrap();
            if !cold {
                let address = json!({ "type": "unix", "data": { "path": socket } });
                let backend =
                    json!({ "type": "socket", "data": { "addr": address, "server": false } });
                qmp.execute("chardev-add", json!({ "id": "hot", "backend": backend }))
                    .unwrap();
            }
            plug(&mut qmp, device.clone());
            let why = refused(&mut qmp, "chardev-remove", json!({ "id": chardev }));
            assert!(why.contains(&format!("'{chardev}'")), "{why}");
            vm.console.send("go\n").unwrap();
            expect(&mut vm, &format!("FOLDER tree-{round} "));
            let sum = vm.console.rest_of_line(LIMIT).unwrap();
            sums.push((tree.join(format!("round-{round}")), sum.trim().to_owned()));
            vm.console.send("unmount\n").unwrap();
            expect(&mut vm, "LOADED ");
            load_worked(&mut vm);
            unplug(&mut qmp, "folder");
            // Nobody has its socket any more.
            daemon.wait(LIMIT).unwrap();
            if !cold {
                run(&mut qmp, "chardev-remove", json!({ "id": "hot" }));
            }
            vm.console.send("gone\n").unwrap();
        }
        let known = qmp.execute("query-chardev", json!({})).unwrap();
        let cold = known.as_array().unwrap().iter();
        let cold: Vec<_> = cold.filter(|one| one["label"] == "cold").collect();
        assert_eq!(cold.len(), 1, "{known}");
        assert_eq!(cold[0]["frontend-open"], false, "{known}");
        vm.console.send("stop\n").unwrap();
        ends_well(&mut vm);
        for (file, sum) in sums {
            assert_eq!(md5(&fs::read(&file).unwrap()), sum, "{}", file.display());
        }
    });
}

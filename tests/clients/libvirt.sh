#!/bin/sh
# libvirt's QEMU driver in this process, with stratovirt as the emulator: what it can do, then a guest from start to end.
# Arguments: an empty folder, the emulator, a guest's kernel, a tap that is there. Runs in a mount namespace of its own, because the driver looks
# for a user that only the package of its daemon makes. The guest has a card and no disk: this driver (9.0) refuses one of a
# microvm on x86 by itself, before it starts the emulator, which the third run shows.
set -eu
dir=$1 emulator=$2 kernel=$3 tap=$4
for file in passwd group; do
    cp "/etc/$file" "$dir/$file"
done
grep -q '^libvirt-qemu:' "$dir/group" || echo 'libvirt-qemu:x:64055:' >>"$dir/group"
grep -q '^libvirt-qemu:' "$dir/passwd" ||
    echo 'libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin' >>"$dir/passwd"
for file in passwd group; do
    mount --bind "$dir/$file" "/etc/$file"
done
mkdir -p "$dir/root/etc"
# The driver's own jails are for emulators that have none.
cat >"$dir/root/etc/qemu.conf" <<CONF
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
CONF
cat >"$dir/guest.xml" <<XML
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='microvm'>hvm</type>
    <kernel>$kernel</kernel>
    <cmdline>end=halt</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <emulator>$emulator</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <interface type='ethernet'>
      <target dev='$tap' managed='no'/>
      <model type='virtio'/>
      <address type='virtio-mmio'/>
    </interface>
  </devices>
</domain>
XML
virsh -c "qemu:///embed?root=$dir/root" \
    "domcapabilities --emulatorbin $emulator --virttype kvm --machine microvm" | cat
# One connection, since the driver ends with it.
virsh -c "qemu:///embed?root=$dir/root" \
    "create $dir/guest.xml; domstate guest; suspend guest; domstate guest --reason; resume guest; domstate guest; \
     dominfo guest; vcpuinfo guest; qemu-monitor-command guest --pretty '{\"execute\":\"query-name\"}'; reset guest; destroy guest; list --all" 2>&1
for address in "" "<address type='virtio-mmio'/>"; do
    disk="<disk type='file'><source file='$dir/passwd'/><target dev='vda' bus='virtio'/>$address</disk>"
    sed "s|<interface type|$disk&|" "$dir/guest.xml" >"$dir/disk.xml"
    virsh -c "qemu:///embed?root=$dir/root" "create $dir/disk.xml" 2>&1 || true
done

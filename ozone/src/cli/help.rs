//! What `ozone -help` prints.

/// The page.
pub(super) const TEXT: &str = "\
ozone - run stratovirt in a jail of its own, as an unprivileged user

Usage (as root):
  ozone -name NAME -exec_file FILE -uid N -gid N [option]… -- STRATOVIRT ARGUMENTS
  ozone -name NAME -exec_file FILE -clean-resource

Options start with one dash or two.
  -name NAME         name of the jail, unique per exec_file: 1 to 255 bytes, no '/', not '.' or '..'
  -exec_file FILE    the stratovirt to run; a statically linked program. The device programs beside it,
                     or in ../libexec/stratovirt, come along
  -uid N, -gid N     user and group that the VM runs as: 1 to 4294967294
  -capability CAP…   capabilities that the VM keeps, like CAP_NET_ADMIN; none if not given
  -netns FILE        network namespace to run in, as `ip netns add mynet` leaves in /run/netns/mynet
  -source FILE…      files, folders or block devices that appear as ./NAME in the jail, with their owner's
                     rights for -uid. Read-only where the command line only reads them
  -cgroup KEY=VALUE… cpuset.cpus=LIST, like 0-1,4, and memory.limit_in_bytes=N, also with K, M or G;
                     cgroup v1 and v2
  -numa NODE…        memory nodes to use, like 0 or 0-1; needed with cpuset.cpus
  -clean-resource    remove what a VM of this name left; nothing left is fine, a running VM is an error
  -help, -version    this page, the version

In the jail, / is /srv/zozne/EXEC_FILE'S NAME/NAME of the host: paths for stratovirt are ./NAME, and a QMP
socket made there can be reached from outside. There is only what the command line needs: /dev/kvm, and
/dev/net/tun with a tap that is opened by its name, and so on. Descriptors are closed but 0 to 2 and those that
fd=, fds=, vhostfd= or vhostfds= name.

Example:
  ozone -name vm1 -exec_file /usr/bin/stratovirt -uid 100 -gid 100 -netns /run/netns/mynet \\
    -source /boot/vmlinux.bin /var/lib/rootfs -numa 0 -cgroup cpuset.cpus=0-1 memory.limit_in_bytes=1G -- \\
    -kernel ./vmlinux.bin -append console=ttyS0 root=/dev/vda rw -serial stdio \\
    -drive file=./rootfs,id=rootfs,direct=off -device virtio-blk-device,drive=rootfs \\
    -qmp unix:./qmp.sock,server,nowait

ozone stays as the VM's parent, without any right: it passes signals on and ends as the VM ends, with its exit
status or by its signal. Then `ozone -name vm1 -exec_file /usr/bin/stratovirt -clean-resource` removes the folder
and the cgroups. The page ozone(1) tells more.
";

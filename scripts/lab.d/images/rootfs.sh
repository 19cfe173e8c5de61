#!/bin/bash
# Debian with Xen, as dom0 has it: rootfs.tar, the stock hypervisor, kernel and initrd, Xen's stream verifier.
set -euo pipefail
cd "$1"
packages=(
  systemd-sysv udev dbus kmod initramfs-tools procps iproute2 netbase openssh-server openssh-client
  xen-utils-4.17 xen-hypervisor-4.17-amd64 libxenmisc4.17 linux-image-amd64
  qemu-system-xen # device model of HVM guests
  libxen-dev      # the unversioned libxenctrl.so, which a test oracle loads
  busybox-static python3-minimal zstd
)
"$LAB_D/bootstrap" rootfs.tar "$(IFS=,; echo "${packages[*]}")"

mkdir root
tar -xf rootfs.tar -C root
zcat root/boot/xen-4.17-amd64.gz >xen.elf
cp root/boot/vmlinuz-* vmlinuz
cp root/boot/initrd.img-* initrd.img
mkdir -p small verify-stream
cp root/bin/busybox small/
for module in xen-netfront xen-blkfront; do
  find root/lib/modules -name "$module.ko" -exec cp {} small/ \;
done
cp root/usr/lib/xen-4.17/bin/verify-stream-v2 verify-stream/
cp -r root/usr/lib/xen-4.17/lib/python verify-stream/
rm -rf root

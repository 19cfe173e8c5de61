#!/bin/bash
# guests.img: kernels and ramdisks of the guests and the lab-guest program. Both hosts mount it at /srv/guests.
set -euo pipefail
cd "$1"
mkdir -p root/bin root/small root/debian
cp "$GUEST_BINARY" root/bin/lab-guest
cp "${IMAGE_rootfs:?}/vmlinuz" root/small/

mkdir -p small/bin small/dev small/proc small/sys small/lib
cp "${IMAGE_rootfs:?}/small/busybox" "$GUEST_BINARY" small/bin/
cp "${IMAGE_rootfs:?}"/small/*.ko small/lib/
for applet in sh mount ip insmod sleep sed cat mkdir echo hostname dd; do ln -s busybox "small/bin/$applet"; done
install -m 755 "$LAB_D/small/init" small/init
(cd small && find . | cpio -o -H newc --quiet | gzip -1) >root/small/initrd

cp "${IMAGE_debian:?}/vmlinuz" root/debian/
mkdir -p debian/lab
cp "$GUEST_BINARY" debian/lab/
# In front of Debian's: the kernel takes archives one after the other, if the first is not compressed.
{ (cd debian && printf 'lab\nlab/lab-guest\n' | cpio -o -H newc --quiet -R 0:0); cat "${IMAGE_debian:?}/initrd"; } >root/debian/initrd

mkfs.ext4 -q -d root -L guests guests.img 128M
rm -rf root small debian

#!/bin/bash
# disk.raw, vmlinuz and initrd of the Debian guest: systemd, PostgreSQL, nginx, a compiler, and their load.
set -euo pipefail
cd "$1"
packages=(
  systemd-sysv udev dbus kmod initramfs-tools procps iproute2 netbase linux-image-cloud-amd64
  postgresql postgresql-contrib nginx-light curl gcc libc6-dev bzip2
)
# The ramdisk is made when the kernel is installed, so its configuration comes first. The database is
# filled here, on a socket of its own: in the guest that takes minutes.
cat >fill <<'SH'
set -e
export PGHOST=/tmp
server="/usr/lib/postgresql/15/bin/pg_ctl -s -w -D /var/lib/postgresql/15/main"
trap '$server stop' EXIT
$server -l /tmp/fill.log -o '-c config_file=/etc/postgresql/15/main/postgresql.conf -c listen_addresses= -k /tmp' start
createdb lab
pgbench -qi -s 5 lab
SH
"$LAB_D/bootstrap" rootfs.tar "$(IFS=,; echo "${packages[*]}")" \
  --setup-hook="mkdir -p \"\$1/etc\" && cp -r '$LAB_D/debian/etc/initramfs-tools' \"\$1/etc/\" &&
    chmod 755 \"\$1/etc/initramfs-tools/scripts/init-bottom/lab\"" \
  --customize-hook="chroot \"\$1\" su postgres -s /bin/sh <'$PWD/fill'"
rm fill

mkdir root
tar -xf rootfs.tar -C root
cp root/boot/vmlinuz-* vmlinuz
cp root/boot/initrd.img-* initrd
cp -r "$LAB_D/debian/." root/
chmod 755 root/usr/local/sbin/*
# Its contents come with the ramdisk.
install -m 755 /dev/null root/usr/local/bin/lab-guest
: >root/etc/machine-id
units=root/etc/systemd/system
mkdir -p "$units/multi-user.target.wants"
for unit in "$LAB_D"/debian/etc/systemd/system/lab-*.service; do
  ln -s "../${unit##*/}" "$units/multi-user.target.wants/"
done
for unit in e2scrub_reap.service e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer \
  dpkg-db-backup.timer fstrim.timer systemd-timesyncd.service getty@tty1.service serial-getty@hvc0.service; do
  ln -sf /dev/null "$units/$unit"
done
mkfs.ext4 -q -d root -L debian disk.raw 2G
rm -rf root rootfs.tar

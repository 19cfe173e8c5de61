#!/bin/bash
# dom0.img, the disk that each host's overlay stands on; id, the key that opens it.
set -euo pipefail
cd "$1"
mkdir root
tar -xf "${IMAGE_rootfs:?}/rootfs.tar" -C root
cp -r "$LAB_D/dom0/." root/
chmod 755 root/usr/local/sbin/*
ssh-keygen -q -t ed25519 -N '' -C xenfold-lab -f id
install -d -m 700 root/root/.ssh
cp id.pub root/root/.ssh/authorized_keys
install -m 600 id root/root/.ssh/id_ed25519
printf 'Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n' >root/root/.ssh/config
ln -s /srv/guests/bin/lab-guest root/usr/local/bin/lab-guest
mkdir -p root/srv/guests root/etc/xen/auto root/root/guests root/var/log/xen/console
rm -f root/etc/machine-id root/etc/hostname
touch root/etc/machine-id
units=root/etc/systemd/system
mkdir -p "$units/multi-user.target.wants"
ln -s ../lab-net.service "$units/multi-user.target.wants/"
# Not wanted here, and each costs seconds under emulation.
for unit in xendomains.service e2scrub_reap.service e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer \
  dpkg-db-backup.timer fstrim.timer systemd-timesyncd.service getty@tty1.service; do
  ln -sf /dev/null "$units/$unit"
done
mkfs.ext4 -q -d root -L dom0 dom0.img 4G
rm -rf root

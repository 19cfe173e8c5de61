#!/bin/bash
# xen.elf: Debian's hypervisor built again with paging, sharing and shadow paging.
set -euo pipefail
cd "$1"
# apt with source packages: a private configuration, the machine's own stays as it is.
mkdir -p apt/lists/partial apt/cache/archives/partial
# shellcheck disable=SC2016 # apt's variables
apt-get indextargets --format 'deb-src $(REPO_URI) $(RELEASE) $(COMPONENT)' \
  'Created-By: Packages' 'Origin: Debian' 'Component: main' | sort -u >apt/sources.list
options=(-o "Dir::Etc::sourcelist=$PWD/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$PWD/apt/lists"
  -o "Dir::Cache=$PWD/apt/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
# The newest 4.17 that can be had: a mirror may lack the newest security version.
versions=$(apt-cache "${options[@]}" showsrc xen | sed -n 's/^Version: //p' | grep '^4\.17' | sort -Vru)
for version in $versions; do
  if (cd apt && apt-get "${options[@]}" --only-source -d source "xen=$version"); then break; fi
done
ls apt/*.dsc || { echo "no source package of xen 4.17 could be downloaded"; exit 1; }
dpkg-source -x apt/*.dsc xen

cd xen
# Sharing is refused without Intel's VMX; on AMD's nested paging, which QEMU emulates, it works.
sed -i 's/ *|| !cpu_has_vmx//' xen/arch/x86/mm/mem_sharing.c
! grep -n 'cpu_has_vmx' xen/arch/x86/mm/mem_sharing.c || { echo "mem_sharing.c has changed"; exit 1; }
unset CFLAGS CPPFLAGS LDFLAGS
{
  cat debian/xen-kconfig
  printf 'CONFIG_%s=y\n' EXPERT UNSUPPORTED MEM_PAGING MEM_SHARING SHADOW_PAGING
} >xen/.config
make -C xen olddefconfig
for option in MEM_PAGING MEM_SHARING SHADOW_PAGING; do
  grep "^CONFIG_$option=y" xen/.config || { echo "$option did not stay on"; exit 1; }
done
nice make -C xen -j2
cd ..
# The loader wants a 32-bit ELF: the compressed image's contents.
zcat xen/xen/xen.gz >xen.elf
rm -rf xen apt

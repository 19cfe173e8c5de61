# shellcheck shell=bash
# Images: each is made by images/NAME.sh in a folder $CACHE/NAME-KEY, KEY being a hash of what it is
# made from. A folder is complete or does not exist.

# What each image is made from, beside its own script: files here, and images.
made_from() {
  case $1 in
    rootfs) echo "$LAB_D/bootstrap" ;;
    dom0) echo "image:rootfs $LAB_D/dom0" ;;
    debian) echo "$LAB_D/bootstrap $LAB_D/debian" ;;
    guests) echo "image:rootfs image:debian $LAB_D/small $(guest_binary)" ;;
    hypervisor) ;;
  esac
}

guest_binary() { echo "${CARGO_TARGET_DIR:-$REPO/target}/x86_64-unknown-linux-gnu/release/lab-guest"; }

image_key() {
  local from
  {
    cat "$LAB_D/images/$1.sh"
    for from in $(made_from "$1"); do
      case $from in
        image:*) image_key "${from#image:}" ;;
        *) find "$from" -type f -print0 | sort -z | xargs -0 cat ;;
      esac
    done
  } | sha256sum | cut -c1-16
}

image() { echo "$CACHE/$1-$(image_key "$1")"; }

# Makes an image unless it exists. The images that it is made from must exist.
make_image() {
  local name=$1 dir tmp begin=$SECONDS from
  dir=$(image "$name")
  if [ -d "$dir" ]; then
    touch "$dir"
    return
  fi
  [ "$(id -u)" = 0 ] || die "building images needs root (mmdebstrap, file ownership): run scripts/lab build as root"
  rm -rf "$CACHE/tmp-$name".* # of builds that were killed; we hold the lock
  tmp=$(mktemp -d "$CACHE/tmp-$name.XXXXXX")
  say "building $name (log: $CACHE/$name.log)"
  for from in $(made_from "$name"); do
    case $from in image:*) export "IMAGE_${from#image:}=$(image "${from#image:}")" ;; esac
  done
  export GUEST_BINARY
  GUEST_BINARY=$(guest_binary)
  if ! "$LAB_D/images/$name.sh" "$tmp" >"$CACHE/$name.log" 2>&1; then
    tail -n 20 "$CACHE/$name.log" >&2
    rm -rf "$tmp"
    die "building $name failed; its whole log is $CACHE/$name.log"
  fi
  mv -T "$tmp" "$dir"
  say "built $name in $((SECONDS - begin)) s"
  # Keep the two newest: another checkout may be using the older one.
  find "$CACHE" -maxdepth 1 -type d -name "$name-*" -printf '%T@ %p\n' | sort -rn | tail -n +3 |
    cut -d' ' -f2- | xargs -r rm -rf
}

# Debian packages that this machine needs.
PACKAGES=(qemu-system-x86 qemu-utils mmdebstrap e2fsprogs cpio zstd openssh-client python3 perl-base iproute2)
PACKAGES_HYPERVISOR=(build-essential bc flex bison dpkg-dev python3 libelf-dev)

install_packages() {
  local missing
  missing=$(missing_packages "$@")
  [ -n "$missing" ] || return 0
  [ "$(id -u)" = 0 ] || die "these packages are missing, install them as root: $missing"
  say "installing $missing"
  apt-get update -q >"$CACHE/apt.log" 2>&1 || die "apt-get update failed: $(tail -n 3 "$CACHE/apt.log")"
  apt_install "$missing"
  # A package from another release that was there can have been pushed out by its neighbour from this one (qemu-utils
  # from backports by qemu-system-x86): it is had again from this release.
  missing=$(missing_packages "$@")
  [ -z "$missing" ] || apt_install "$missing"
}

missing_packages() {
  comm -23 <(printf '%s\n' "$@" | sort) \
    <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p' | sort) |
    paste -sd' '
}

apt_install() { # "PACKAGE…"
  # shellcheck disable=SC2086 # one word per package
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $1 >>"$CACHE/apt.log" 2>&1 ||
    die "apt-get install failed, see $CACHE/apt.log: $(tail -n 3 "$CACHE/apt.log")"
}

build_guest_binary() {
  local cargo
  cargo=$(command -v cargo || echo "$HOME/.cargo/bin/cargo")
  [ -x "$cargo" ] || die "cargo is needed for tests/guest: install Rust (see README.md)"
  (cd "$REPO" && RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' nice "$cargo" build -q --release \
    --target x86_64-unknown-linux-gnu -p lab-guest) || die "tests/guest does not build"
}

lab_build() {
  local hypervisor=stock name
  while [ $# -gt 0 ]; do
    case $1 in
      --hypervisor) hypervisor=$2; shift ;;
      *) die "build: unknown option '$1'" ;;
    esac
    shift
  done
  mkdir -p "$CACHE"
  exec 9>"$CACHE/build.lock"
  flock -n 9 || { say "waiting for another build"; flock 9; }
  install_packages "${PACKAGES[@]}"
  build_guest_binary
  for name in rootfs dom0 debian guests; do make_image "$name"; done
  if [ "$hypervisor" = paging ]; then
    install_packages "${PACKAGES_HYPERVISOR[@]}"
    make_image hypervisor
  fi
  exec 9>&-
}

lab_verify_stream() {
  [ $# = 1 ] || die "usage: lab verify-stream FILE"
  local tools format=libxl
  tools=$(image rootfs)/verify-stream
  [ -d "$tools" ] || die "no Xen tools yet: run scripts/lab build"
  [ "$(head -c 26 "$1")" != 'Xen saved domain, xl forma' ] || format=xl
  PYTHONPATH=$tools/python PYTHONDONTWRITEBYTECODE=1 python3 "$tools/verify-stream-v2" -f $format -i "$1"
}

# shellcheck shell=bash
# Guests of the lab, and what is measured on them.

lab_guest() {
  local command=${1:-}
  [ $# = 0 ] || shift
  case $command in
    create | where | check | console | load | list | destroy) "guest_$command" "$@" ;;
    *) die "usage: lab guest create|where|check|console|load|list|destroy …" ;;
  esac
}

# The host that runs a guest, if one does.
guest_host() {
  local host
  for host in a b; do
    if running "$host" && on "$host" xl domid "$1" </dev/null >/dev/null 2>&1; then
      echo "$host"
      return
    fi
  done
  return 1
}

guest_where() { guest_host "${1:?usage: lab guest where NAME}" || die "no host runs a guest '$1'"; }

guest_config() { # uses the variables of guest_create
  # A name always gets the same MAC and IP address: both hosts, and both of its lives, agree on them.
  local n=$((50 + $(printf %s "$name" | cksum | cut -d' ' -f1) % 200))
  local arguments="console=hvc0 quiet norandmaps lab.name=$name lab.ip=10.9.0.$n lab.check=$check lab.write=$write lab.race=$race lab.racing=$racing"
  cat <<CFG
name = "$name"
type = "$type"
memory = $memory
vcpus = 1
kernel = "/srv/guests/$kind/vmlinuz"
ramdisk = "/srv/guests/$kind/initrd"
vif = [ "mac=00:16:3e:00:00:$(printf %02x $n),bridge=xenbr0,type=vif" ]
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
CFG
  [ "$type" != hvm ] || printf 'vga = "none"\nxen_platform_pci = 1\n'
  if [ "$kind" = debian ]; then
    printf 'disk = [ "phy:%s,xvda,w" ]\n' "$(disk_device "$disk")"
    arguments="root=/dev/xvda rw net.ifnames=0 $arguments systemd.hostname=$name$without"
  fi
  printf 'extra = "%s"\n' "$arguments"
}

guest_create() {
  local name='' kind=small type=pvh host=a memory='' check='' write=0 race=0 racing=16 disk=1 wait=1 without='' patience begin=$SECONDS
  while [ $# -gt 0 ]; do
    case $1 in
      --kind) kind=$2; shift ;;
      --type) type=$2; shift ;;
      --on) host=$2; shift ;;
      --memory) memory=$2; shift ;;
      --check) check=$2; shift ;;
      --write) write=$2; shift ;;
      --race) race=$2; shift ;;
      --racing) racing=$2; shift ;;
      --disk) disk=$2; shift ;;
      --without) without+=" systemd.mask=lab-$2.service"; shift ;;
      --no-wait) wait=0 ;;
      -*) die "guest create: unknown option '$1'" ;;
      *) name=$1 ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z][a-z0-9-]*$ ]] || die "guest create: a name of lower case letters, digits and - is needed"
  case $type in pvh | hvm | pv) ;; *) die "guest create: no type '$type': pvh, hvm or pv" ;; esac
  case $kind in
    small) memory=${memory:-192} check=${check:-16} patience=400 ;;
    debian) memory=${memory:-640} check=${check:-64} patience=900 ;;
    *) die "guest create: no kind '$kind': small or debian" ;;
  esac
  must_run "$host"
  ! guest_host "$name" >/dev/null || die "guest $name runs already, on $(guest_host "$name")"
  [ "$kind" != debian ] || disk_is_free "$disk"
  guest_config | on "$host" "cat >/root/guests/$name.cfg"
  on "$host" "xl create -q /root/guests/$name.cfg" </dev/null ||
    die "xl create failed on $host; scripts/lab logs $host shows xl's and the device model's logs"
  [ $wait = 1 ] || return 0
  say "guest $name starts on $host; waiting for its checker"
  on "$host" "lab-guest listen --name $name --passes 1 --seconds $patience" </dev/null >/dev/null || {
    guest_console "$name" 20 >&2
    die "guest $name does not report after $((SECONDS - begin)) s; the end of its console is above"
  }
  say "guest $name is ready after $((SECONDS - begin)) s"
}

# Disk 1 or 2 of the Debian guests, as QEMU shows it to both hosts.
disk_device() { case $1 in 1) echo /dev/vdb ;; 2) echo /dev/vdc ;; *) die "no disk '$1': 1 or 2" ;; esac; }

# Two guests on one disk would destroy it.
disk_is_free() {
  local host device
  device=$(disk_device "$1")
  for host in a b; do
    running "$host" || continue
    ! on "$host" "xenstore-ls -f /local/domain/0/backend/vbd 2>/dev/null | grep -q 'params = \"$device\"'" </dev/null ||
      die "disk $1 is in use by a guest on $host; take the other, or destroy that guest"
  done
}

guest_check() {
  local name=${1:?usage: lab guest check NAME [SECONDS]} seconds=${2:-120} host
  host=$(guest_where "$name")
  on "$host" "lab-guest listen --name $name --passes 2 --seconds $seconds" </dev/null
}

guest_console() {
  local name=${1:?usage: lab guest console NAME [LINES]} lines=${2:-40} host
  for host in a b; do
    running "$host" || continue
    # At the destination the log bears the name that the guest had while it arrived.
    on "$host" "cd /var/log/xen/console 2>/dev/null && for f in \$(ls -tr guest-$name.log guest-$name--incoming.log 2>/dev/null); do tail -n $lines \$f; done" </dev/null |
      tr -d '\r' | sed "s/^/$name on $host| /"
  done
}

guest_load() {
  local name=${1:?usage: lab guest load NAME WORKLOAD} load=${2:?usage: lab guest load NAME WORKLOAD} host n
  host=$(guest_where "$name")
  for ((n = 0; n < 300; n++)); do
    # What comes before the guest listens is lost.
    ((n % 30)) || on "$host" "echo $load >\"\$(xenstore-read /local/domain/\$(xl domid $name)/console/tty)\"" </dev/null
    [[ $(guest_console "$name" 50) != *"guest load: $load"* ]] || return 0
    sleep 1
  done
  die "guest $name does not run $load: is it a Debian guest?"
}

guest_list() {
  local host
  for host in a b; do
    running "$host" || continue
    on "$host" xl list </dev/null | sed -n "1!s/^/xen-$host| /p" | grep -v Domain-0 || true
  done
}

guest_destroy() {
  local name=${1:?usage: lab guest destroy NAME} host
  host=$(guest_where "$name")
  on "$host" "xl destroy $name" </dev/null
}

lab_ticks() {
  [ $# -ge 3 ] || die "usage: lab ticks a|b NAME CMD…"
  local host=$1 name=$2 out listener status=0
  shift 2
  must_run "$host"
  out=$(mktemp -d)
  mkfifo "$out/stdin"
  on "$host" "lab-guest ticks --name $name" <"$out/stdin" >"$out/json" 2>"$out/errors" &
  listener=$!
  exec 8>"$out/stdin"
  until grep -q listening "$out/errors"; do
    kill -0 $listener 2>/dev/null || die "the listener on $host ended: $(cat "$out/errors")"
    sleep 0.1
  done
  "$@" 8>&- || status=$?
  exec 8>&-
  wait $listener || say "no datagram of $name arrived at $host"
  cat "$out/json"
  rm -r "$out"
  return $status
}

lab_capture() {
  [ $# = 2 ] || die "usage: lab capture NAME FILE"
  local name=$1 file=$2 host
  host=$(guest_where "$name")
  on "$host" "xl save -c $name /root/capture.save >&2" </dev/null || die "xl save failed on $host"
  on "$host" 'zstd -q -1 --rm -c /root/capture.save; rm -f /root/capture.save' </dev/null | zstd -q -d -o "$file.tmp" -f
  mv "$file.tmp" "$file"
  say "captured $name from $host: $(stat -c %s "$file") bytes in $file"
}

lab_trace() {
  [ $# -ge 2 ] || die "usage: lab trace NAME FILE [SECONDS]"
  local name=$1 file=$2 seconds=${3:-60} host
  host=$(guest_where "$name")
  on "$host" "xenfold trace $name /root/dirty.trace --seconds $seconds >&2" </dev/null || die "no trace of $name on $host"
  on "$host" 'cat /root/dirty.trace; rm -f /root/dirty.trace' </dev/null >"$file.tmp"
  mv "$file.tmp" "$file"
  say "traced $name on $host: $(stat -c %s "$file") bytes in $file; look at it with xenfold simulate"
}

# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# The two hosts: QEMU processes, their overlays, ssh, the link between them.
# State of host H in $STATE: H.pid, H.qcow2, H.log (serial), H.out (QEMU's words), H.monitor, H.port, H.ssh.

HOST_MIB=${LAB_HOST_MIB:-3072}

address_of() { case $1 in a) echo 10.9.0.1 ;; b) echo 10.9.0.2 ;; *) die "no host '$1': a or b" ;; esac; }

# A pid file counts only while the process is the QEMU that runs on this state.
running() {
  local pid
  pid=$(cat "$STATE/$1.pid" 2>/dev/null) || return 1
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$STATE/$1.qcow2"
}

# Each of the pair's three ports (N: 0 to 2) from a range of its own.
free_port() { # N
  local port
  while :; do
    port=$((20000 + $1 * 4000 + RANDOM % 4000))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

accelerator() {
  if grep -qsE '^(Y|1)' /sys/module/kvm_{intel,amd}/parameters/nested && (: <>/dev/kvm) 2>/dev/null; then
    echo kvm
  else
    echo tcg
  fi
}

SSH_OPTIONS=(-q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=20
  -o ServerAliveInterval=20 -o ServerAliveCountMax=6)

# Runs a command in a dom0. `up` opens one connection for each host, which all later commands share.
on() {
  local host=$1
  shift
  ssh "${SSH_OPTIONS[@]}" -i "$STATE/id" -S "$STATE/$host.ssh" -p "$(cat "$STATE/$host.port")" root@127.0.0.1 "$@"
}

must_run() { running "$1" || die "host $1 is down: run scripts/lab up (if it was up, $STATE/$1.log says why it ended)"; }

start_host() {
  local host=$1 link=$2 xen=$3 dom0 rootfs disk n cpu drives=()
  dom0=$(image dom0)/dom0.img
  rootfs=$(image rootfs)
  qemu-img create -q -f qcow2 -b "$dom0" -F raw "$STATE/$host.qcow2"
  for n in 1 2; do
    disk=$STATE/disk$n.raw
    # Both hosts hold the guest's disk open; libxl hands it over when a guest migrates, as a SAN would.
    [ ! -e "$disk" ] || drives+=(-drive "file=$disk,if=virtio,format=raw,cache=none,file.locking=off")
  done
  drives+=(-drive "file=$STATE/guests.img,if=virtio,format=raw,readonly=on,file.locking=off")
  case $(accelerator) in
    kvm) cpu=(-accel kvm -cpu host) ;;
    tcg) cpu=(-accel "tcg,thread=multi,tb-size=512"
      # No more than SSE2: what came later (AES, shuffles of bytes) is slower under emulation than doing without.
      -cpu "qemu64,+svm,+npt,+popcnt,+pdpe1gb") ;;
  esac
  n=$(address_of "$host")
  n=${n##*.}
  # norandmaps: QEMU without KVM translates a program again for each address that it runs at, and forgets all it has
  # translated when half a gigabyte is full. With random addresses a short process costs 2.6 MB of that, and up to 1.8 times the time.
  setsid qemu-system-x86_64 -name "xen-$host" "${cpu[@]}" -smp 1 -m "$HOST_MIB" \
    -display none -nodefaults -no-reboot \
    -kernel "$xen" -initrd "$rootfs/vmlinuz root=/dev/vda rw console=hvc0 quiet loglevel=4 norandmaps systemd.hostname=xen-$host lab.ip=$(address_of "$host"),$rootfs/initrd.img" \
    -append "console=com1 com1=115200 dom0_mem=1024M,max:1024M dom0_max_vcpus=1 sched=credit" \
    -drive "file=$STATE/$host.qcow2,if=virtio,format=qcow2" "${drives[@]}" \
    -netdev "user,id=lab0,restrict=on,hostfwd=tcp:127.0.0.1:$(cat "$STATE/$host.port")-:22" \
    -device "virtio-net-pci,netdev=lab0,mac=52:54:00:aa:00:0$n" \
    -netdev "socket,id=link0,$link" -device "virtio-net-pci,netdev=link0,id=link0,mac=52:54:00:bb:00:0$n" \
    -monitor "unix:$STATE/$host.monitor,server=on,wait=off" \
    -serial "file:$STATE/$host.log" </dev/null >"$STATE/$host.out" 2>&1 9>&- &
  echo $! >"$STATE/$host.pid"
}

wait_for_host() {
  local host=$1 begin=$2 said=$SECONDS
  until on "$host" 'xl list >/dev/null 2>&1 && test -e /srv/guests/bin' </dev/null >/dev/null 2>&1; do
    running "$host" || die "host $host ended while booting: $(tail -n 3 "$STATE/$host.out" "$STATE/$host.log")"
    if ((SECONDS - said >= 15)); then
      said=$SECONDS
      say "host $host is still booting ($((SECONDS - begin)) s): $(tail -n 1 "$STATE/$host.log" | tr -d '\r' | cut -c1-90)"
    fi
    ((SECONDS - begin < 600)) || die "host $host does not come up; its console is $STATE/$host.log"
    sleep 2
  done
  # The connection that later commands share; it must not hold our output open.
  on "$host" -M -N -f </dev/null >/dev/null 2>&1
}

lab_up() {
  local hypervisor=stock xen port host begin n
  while [ $# -gt 0 ]; do
    case $1 in
      --hypervisor) hypervisor=$2; shift ;;
      *) die "up: unknown option '$1'" ;;
    esac
    shift
  done
  case $hypervisor in stock | paging) ;; *) die "up: no hypervisor '$hypervisor': stock or paging" ;; esac
  for host in a b; do ! running "$host" || die "host $host is up already: run scripts/lab down first"; done
  lab_build --hypervisor "$hypervisor"
  begin=$SECONDS
  mkdir -p "$STATE"
  xen=$(image rootfs)/xen.elf
  [ "$hypervisor" = stock ] || xen=$(image hypervisor)/xen.elf
  install -m 600 "$(image dom0)/id" "$STATE/id"
  cp "$(image guests)/guests.img" "$STATE/guests.img.new"
  mv "$STATE/guests.img.new" "$STATE/guests.img"
  for n in 1 2; do
    [ ! -e "$(image debian)/disk.raw" ] || cp --reflink=auto --sparse=always "$(image debian)/disk.raw" "$STATE/disk$n.raw"
  done
  echo "$hypervisor" >"$STATE/hypervisor"
  accelerator >"$STATE/accelerator"
  port=$(free_port 0)
  free_port 1 >"$STATE/a.port"
  free_port 2 >"$STATE/b.port"
  say "starting hosts a and b ($(cat "$STATE/accelerator"), $hypervisor Xen)"
  start_host a "listen=127.0.0.1:$port" "$xen"
  sleep 1
  start_host b "connect=127.0.0.1:$port" "$xen"
  for host in a b; do
    wait_for_host "$host" "$begin"
    # A dom0 that shares its one processor with guests in equal parts moves bytes at the pace of their load. Hosts with
    # a processor to spare do not have that; this comes near.
    on "$host" 'xl sched-credit -d Domain-0 -w 512' </dev/null
  done
  on a 'ssh b true && ssh b ssh a true' </dev/null || die "a and b do not reach each other"
  say "both hosts are up after $((SECONDS - begin)) s"
}

lab_down() {
  local host pid n
  for host in a b; do
    if running "$host"; then
      on "$host" -O exit >/dev/null 2>&1 || true
      pid=$(cat "$STATE/$host.pid")
      kill "$pid"
      for ((n = 0; n < 50; n++)); do
        running "$host" || break
        sleep 0.1
      done
      ! running "$host" || kill -KILL "$pid"
      say "host $host is down"
    fi
    rm -f "$STATE/$host".{pid,qcow2,monitor,ssh,port}
  done
  rm -f "$STATE"/disk?.raw
}

lab_status() {
  local host
  for host in a b; do
    if ! running "$host"; then
      echo "host $host: down"
      continue
    fi
    echo "host $host: up (pid $(cat "$STATE/$host.pid"), $(cat "$STATE/accelerator"), $(cat "$STATE/hypervisor") Xen, ssh port $(cat "$STATE/$host.port"), console $STATE/$host.log)"
    # shellcheck disable=SC2016 # expanded in dom0
    on "$host" 'echo "Xen $(xl info xen_version), free $(xl info free_memory) MiB, limit $(cat /run/lab-rate 2>/dev/null || echo none)"; xl list' </dev/null |
      sed "s/^/  xen-$host| /" || echo "  xen-$host| does not answer"
  done
}

lab_ssh() {
  local host=${1:-}
  address_of "$host" >/dev/null
  must_run "$host"
  shift
  if [ $# = 0 ]; then on "$host" -t; else on "$host" "$*"; fi
}

lab_cp() {
  [ $# -ge 2 ] || die "usage: lab cp FILE… a:PATH | lab cp a:FILE… PATH"
  local arg host paths=()
  for arg in "$@"; do
    case $arg in
      a:* | b:*)
        [ "${host:-${arg%%:*}}" = "${arg%%:*}" ] || die "cp: one host at a time"
        host=${arg%%:*}
        arg=root@127.0.0.1:${arg#*:}
        ;;
    esac
    paths+=("$arg")
  done
  [ -n "${host:-}" ] || die "cp: none of the paths is on a host (a:PATH or b:PATH)"
  must_run "$host"
  scp "${SSH_OPTIONS[@]}" -r -i "$STATE/id" -o ControlPath="$STATE/$host.ssh" -P "$(cat "$STATE/$host.port")" "${paths[@]}"
}

lab_push() {
  local host file built files=("$@") target=${CARGO_TARGET_DIR:-$REPO/target}/release
  if [ $# = 0 ]; then
    for built in xenfold xenfold-ssh xenfoldd; do [ ! -x "$target/$built" ] || files+=("$target/$built"); done
    [ ${#files[@]} -gt 0 ] || die "nothing is built in $target: run cargo build --release -p xenfold-plugin -p xenfoldd"
  fi
  for file in "${files[@]}"; do [ -e "$file" ] || die "push: no file $file"; done
  for host in a b; do
    must_run "$host"
    # A running program cannot be written to, so unpack beside it and rename.
    for file in "${files[@]}"; do
      # shellcheck disable=SC2029 # the name is expanded here
      gzip -1 <"$file" | on "$host" "cd /usr/local/bin && zcat >.new && chmod 755 .new && mv .new '${file##*/}'"
    done
  done
  say "pushed to a and b: ${files[*]##*/}"
}

# The daemon on both hosts, as its package would install it; its store is on the host's own disk.
lab_daemon() {
  local host unit=$REPO/daemon/debian/xenfoldd.service
  for host in a b; do
    must_run "$host"
    case ${1:-} in
      start)
        sed 's,/usr/sbin/,/usr/local/bin/,' "$unit" | on "$host" 'cat >/etc/systemd/system/xenfoldd.service'
        on "$host" 'systemctl daemon-reload && systemctl restart xenfoldd' </dev/null ||
          die "the daemon does not start on $host: $(on "$host" 'journalctl -u xenfoldd -n 20 --no-pager' </dev/null)"
        ;;
      stop) on "$host" 'systemctl stop xenfoldd' </dev/null ;;
      forget) on "$host" 'systemctl stop xenfoldd; rm -rf /var/lib/xenfold' </dev/null ;;
      status) on "$host" 'xenfold status' </dev/null ;;
      *) die 'usage: lab daemon start|stop|forget|status' ;;
    esac
  done
}

lab_logs() {
  local host hosts=(a b) lines=40
  case ${1:-} in a | b) hosts=("$1"); shift ;; esac
  lines=${1:-$lines}
  for host in "${hosts[@]}"; do
    {
      echo "--- serial console: $STATE/$host.log"
      tail -n "$lines" "$STATE/$host.log" 2>/dev/null | tr -d '\r'
      if running "$host"; then
        # shellcheck disable=SC2029
        on "$host" "xl dmesg | tail -n $lines | sed 's/^/xl dmesg: /'
          cd /var/log/xen && tail -n $lines \$(find . -name '*.log' -size +0)" </dev/null || true
      fi
    } 2>&1 | sed "s/^/xen-$host| /"
  done
}

# Datagrams of the guests' tickers and checkers; tests/guest has the same numbers.
TICK_PORT=7001
REPORT_PORT=7002

lab_rate() {
  local rate=${1:-} host
  [[ $rate =~ ^([0-9]+(\.[0-9]+)?|none)$ ]] || die "usage: lab rate MBIT|none"
  for host in a b; do
    must_run "$host"
    on "$host" sh -se "$rate" "$TICK_PORT" "$REPORT_PORT" <<'DOM0' || die "host $host did not take the limit"
rate=$1; shift
tc qdisc del dev link0 root 2>/dev/null || true
rm -f /run/lab-rate
[ "$rate" != none ] || exit 0
tc qdisc add dev link0 root handle 1: htb default 10
tc class add dev link0 parent 1: classid 1:10 htb rate "${rate}mbit" burst 32k cburst 32k
tc class add dev link0 parent 1: classid 1:20 htb rate 10gbit prio 0
for port; do
  tc filter add dev link0 parent 1: protocol ip u32 match ip protocol 17 0xff match ip dport "$port" 0xffff flowid 1:20
done
echo "$rate Mbit/s" >/run/lab-rate
DOM0
  done
  say "link limit: $rate"
}

lab_link() {
  local host state
  case ${1:-} in
    cut) state=off ;;
    restore) state=on ;;
    status)
      for host in a b; do echo "$host: $(on "$host" cat /sys/class/net/link0/operstate </dev/null)"; done
      return
      ;;
    *) die "usage: lab link cut|restore|status" ;;
  esac
  for host in a b; do
    must_run "$host"
    monitor "$host" "set_link link0 $state" >/dev/null
  done
  say "link: ${1}"
}

# One command to QEMU's monitor; Perl, because a plain Debian has no other client of unix sockets.
monitor() {
  perl -MIO::Socket::UNIX -e '
    my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "monitor $ARGV[0]: $!\n";
    sub upto { my $t = ""; while ($t !~ /\(qemu\) $/) { sysread($s, $t, 4096, length $t) or last } $t }
    upto(); print $s "$ARGV[1]\n"; $s->flush; print upto();' "$STATE/$1.monitor" "$2"
}

lab_wire_bytes() {
  local host=${1:-}
  address_of "$host" >/dev/null
  must_run "$host"
  # shellcheck disable=SC2016 # expanded in dom0
  on "$host" 'cd /sys/class/net/link0/statistics && printf "{\"sent_bytes\":%s,\"received_bytes\":%s}\n" "$(cat tx_bytes)" "$(cat rx_bytes)"' </dev/null
}

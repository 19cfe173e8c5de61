# shellcheck shell=bash
# Two Debian guests from copies of the same image: how much of the second one's memory the first spares the wire.

# lab siblings: the first guest is on b, paused and wholly in the index there, while the second migrates from a to b.
# Stores are off, so that what the destination holds is known: the first guest's memory. An oracle that reads both
# memories in full says how many pages could have gone without their bytes.
lab_siblings() {
  local load=same groups=one rate=50 json='' work one=sib-one two=sib-two without=() status=0
  while [ $# -gt 0 ]; do
    case $1 in
      --load) load=${2:-}; shift ;;
      --groups) groups=${2:-}; shift ;;
      --rate) rate=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      *) die "siblings: unknown option '$1'" ;;
    esac
    shift
  done
  [[ $load =~ ^(same|other)$ && $groups =~ ^(one|two)$ ]] || die 'siblings: --load same|other, --groups one|two'
  must_run a
  must_run b
  rm -rf "$STATE"/siblings.* # of a run that failed
  work=$(mktemp -d "$STATE/siblings.XXXXXX")
  if [ "$groups" = one ]; then
    lab_groups 'store_size = 0' 'index_processor = 0' '[group]' 'lab = ["sib-*"]'
  else
    lab_groups 'store_size = 0' 'index_processor = 0' '[group]' 'first = ["sib-one"]' 'second = ["sib-two"]'
  fi
  [ "$load" = same ] || without=(--without compiler --without database)
  lab_rate none
  guest_create $one --kind debian --disk 1 --on b &
  guest_create $two --kind debian --disk 2 --on a "${without[@]}"
  wait $! || die "guest $one does not start"
  say 'both guests get warm'
  sleep 60
  on b "xl pause $one" </dev/null
  indexed b $one
  lab_rate "$rate"
  # xl's stream is read by the oracle later. xenfold-ssh must be xl's own child.
  printf '#!/bin/bash\nexec xenfold-ssh "$@" < <(tee /root/stream)\n' | on a 'cat >/root/tee-ssh && chmod 755 /root/tee-ssh'
  on a "xl migrate -s '/root/tee-ssh --stats /root/siblings.json' $two b" </dev/null || status=$?
  lab_rate none
  [ $status = 0 ] || die "the migration failed (status $status)"
  on b "xl unpause $one" </dev/null
  guest_check $two 300 >&2 || die "guest $two is damaged"
  guest_check $one 300 >&2 || die "guest $one is damaged"
  on a 'cat /root/siblings.json' </dev/null >"$work/figures.json"
  on a 'zstd -q -1 --rm -c /root/stream' </dev/null | zstd -q -d -o "$work/stream"
  lab_capture $one "$work/one.save"
  cargo run --quiet --locked --release --manifest-path "$REPO/Cargo.toml" --example held_pages -- \
    "$work/stream" "$work/one.save" >"$work/oracle.json"
  python3 - "$load" "$groups" "$work/figures.json" "$work/oracle.json" >"$work/result.json" <<'P'
import json, sys
load, groups = sys.argv[1:3]
figures, oracle = (json.load(open(name)) for name in sys.argv[3:])
pages = figures["pages"]
free = pages["known"] - figures["needed_pages"] + pages["reference"]
held = oracle["elsewhere"] + oracle["before"] if groups == "one" else oracle["before"]
print(json.dumps({
    "load": load, "groups": groups, "pages": oracle["pages"], "held_elsewhere": oracle["elsewhere"],
    "sent_before": oracle["before"], "known": pages["known"], "needed": figures["needed_pages"],
    "references": pages["reference"], "deltas": pages["delta"], "full": pages["full"],
    "share_of_held_percent": round(100 * free / max(held, 1), 2),
    "stream_bytes": figures["stream_bytes"], "wire_bytes": figures["wire_bytes"],
    "wire_percent": round(100 * figures["wire_bytes"] / figures["stream_bytes"], 2),
    "time_elapsed_ms": figures["time_elapsed_ms"], "downtime_ms": figures["downtime_ms"]}, indent=1))
P
  cat "$work/result.json"
  [ -z "$json" ] || cp "$work/result.json" "$json"
  rm -r "$work"
  guest_destroy $one
  guest_destroy $two
}

# The daemons, empty, with a configuration of these LINES that names groups lab, first, second or none of them.
lab_groups() {
  local host group key
  lab_daemon forget
  for host in a b; do
    printf '%s\n' "$@" | on "$host" 'cat >/etc/xen/xenfold.conf; mkdir -p -m 700 /var/lib/xenfold/keys'
  done
  # As if guests of the groups had gone from host to host before.
  for group in lab first second; do
    key=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
    for host in a b; do
      echo "$key" | on "$host" "umask 077; cat >/var/lib/xenfold/keys/$group.key"
    done
  done
  lab_daemon start
}

# Waits until the index has gone through all of a guest that does not run any more.
indexed() { # HOST GUEST
  local begin=$SECONDS rounds now
  rounds=$(index_figure "$1" rounds)
  until now=$(index_figure "$1" rounds) && [ "$now" -ge $((rounds + 2)) ]; do
    [ $((SECONDS - begin)) -lt 900 ] || die "the index on $1 has not gone through $2 after 900 s: $(on "$1" 'xenfold index' </dev/null)"
    sleep 5
  done
  say "the index on $1 knows $(index_figure "$1" pages) contents after $((SECONDS - begin)) s"
}

index_figure() { on "$1" 'xenfold index --json' </dev/null | sed -n "s/^ *\"$2\": \([0-9]*\),*$/\1/p" | head -n 1; }

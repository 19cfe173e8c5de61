# shellcheck shell=bash
# lab damage: what the daemons hold is damaged in every way, and they are killed at every phase, around migrations of the
# small guest: its memory is right each time.

DAMAGE_GUEST=damage
STORE=/var/lib/xenfold
DAMAGE_CASES=(flipped truncated removed half-removed garbage-index full read-only killed-before killed-at-start
  killed-in-stream killed-at-end stopped-in-stream overwritten)

# lab damage [CASE…]: all cases, or those named. Each is one migration with --verify, after one that fills both stores.
lab_damage() {
  local name host cases=("${DAMAGE_CASES[@]}") from to
  [ $# = 0 ] || cases=("$@")
  must_run a
  must_run b
  lab_groups '[group]' 'lab = ["damage*"]'
  guest_host $DAMAGE_GUEST >/dev/null || guest_create $DAMAGE_GUEST
  for name in "${cases[@]}"; do
    declare -F "damage_${name//-/_}" >/dev/null || die "damage: no case '$name': ${DAMAGE_CASES[*]}"
    damage_fill
    from=$(guest_where $DAMAGE_GUEST)
    to=$([ "$from" = a ] && echo b || echo a)
    # Old words would be taken for this migration's.
    on "$from" 'rm -f /root/damage.log /root/damage.json' </dev/null
    "damage_${name//-/_}" "$from" "$to"
    [[ $name =~ ^(killed-|stopped-|overwritten) ]] || damage_migrate "$from" "$to"
    damage_judge "$name" "$from" "$to"
  done
  lab_daemon forget
  for host in a b; do on "$host" 'rm /etc/xen/xenfold.conf' </dev/null; done
  say "damage: ${#cases[@]} cases, memory right each time"
}

# There and back, so that both stores hold the guest; at once where they do already.
damage_fill() {
  local from
  for _ in 1 2; do
    from=$(guest_where $DAMAGE_GUEST)
    if on "$from" 'xenfold store stats --json' </dev/null 2>/dev/null | grep -q "\"contents\": [1-9][0-9][0-9][0-9]"; then continue; fi
    damage_migrate "$from" "$([ "$from" = a ] && echo b || echo a)"
  done
}

damage_migrate() { # FROM TO
  on "$1" "xl migrate -s 'xenfold-ssh --verify --stats /root/damage.json' $DAMAGE_GUEST $2 >/root/damage.log 2>&1" </dev/null || {
    on "$1" 'tail -n 30 /root/damage.log' </dev/null >&2
    die "damage: the migration from $1 to $2 failed; its words are above"
  }
}

damage_judge() { # CASE FROM TO
  local figures
  figures=$(on "$2" 'cat /root/damage.json' </dev/null)
  guest_check $DAMAGE_GUEST 240 >/dev/null || die "damage: $1: the guest's memory is wrong"
  python3 - "$1" "$figures" <<'P'
import json, sys
figures = json.loads(sys.argv[2])
assert figures["completed"] and figures["verify"]["equal_pages"] * 4096 > figures["memory_total_bytes"] * 0.9, figures
pages = figures["pages"]
print(f'lab: damage: {sys.argv[1]}: memory right, {figures["verify"]["equal_pages"]} frames equal; {pages["known"]} known, '
      f'{figures["needed_pages"]} needed after all, {pages["delta"]} deltas, {pages["full"]} full, '
      f'{figures["wire_bytes"]} of {figures["stream_bytes"]} bytes')
P
  on "$3" 'mountpoint -q /var/lib/xenfold && { systemctl stop xenfoldd; umount -l /var/lib/xenfold; }; systemctl reset-failed xenfoldd; systemctl start xenfoldd' </dev/null
  on "$3" 'xenfold store verify' </dev/null | sed "s/^/lab: damage: $1: afterwards on $3: /"
}

# The store's files, packs and index, on HOST, as arguments of what follows.
damage_files() { on "$1" "find $STORE -name 'pack-*' -o -name 'index.redb' | xargs $2" </dev/null; }

# One byte in each 8 KiB, under the running daemon.
damage_flipped() {
  damage_files "$2" "perl -e 'for (@ARGV) { open(F, \"+<\", \$_); for (my \$at = 777; \$at < -s F; \$at += 8192) { seek(F, \$at, 0); read(F, my \$byte, 1); seek(F, \$at, 0); print F chr(ord(\$byte) ^ 16) } close F }'"
}

damage_truncated() { damage_files "$2" "perl -e 'truncate(\$_, (-s \$_) / 3) for @ARGV'"; }

damage_removed() { damage_files "$2" 'rm'; }

# Between two lives of the daemon.
damage_half_removed() {
  on "$2" 'systemctl stop xenfoldd' </dev/null
  damage_files "$2" "perl -e 'truncate(\$_, (-s \$_) / 2) for @ARGV'"
  on "$2" 'systemctl start xenfoldd' </dev/null
}

damage_garbage_index() {
  on "$2" "systemctl stop xenfoldd; find $STORE -name index.redb -exec dd if=/dev/urandom of={} bs=4096 seek=1 count=64 conv=notrunc status=none \;; systemctl start xenfoldd" </dev/null
}

# What the store holds is there, and hardly anything more fits.
damage_full() {
  on "$2" "systemctl stop xenfoldd; cp -a $STORE /root/store; size=\$(du -sk $STORE | cut -f1); mount -t tmpfs -o size=\$((size + 512))k,mode=700 tmpfs $STORE && cp -a /root/store/. $STORE; rm -r /root/store; systemctl start xenfoldd" </dev/null
}

damage_read_only() {
  on "$2" "systemctl stop xenfoldd; cp -a $STORE /root/store; mount -t tmpfs -o size=600m,mode=700 tmpfs $STORE && cp -a /root/store/. $STORE; rm -r /root/store; mount -o remount,ro $STORE; systemctl start xenfoldd" </dev/null || say 'the daemon does not start on a read-only disk'
}

# Both daemons are killed for good: systemd would have them back in two seconds.
damage_kill() {
  local host
  for host in a b; do on "$host" 'systemctl kill -s KILL xenfoldd; systemctl stop xenfoldd' </dev/null; done
}

damage_killed_before() { damage_kill; damage_migrate "$1" "$2"; lab_daemon start; }

# Migrates, and does something once the agent's log or, for the first phase, its process is there.
damage_while() { # FROM TO UNTIL COMMAND
  local migration
  lab_rate 20
  damage_migrate "$1" "$2" &
  migration=$!
  on "$1" "until $3; do sleep 0.2; done" </dev/null
  $4
  wait $migration || die 'damage: the migration failed with its daemon'
  lab_rate none
}

damage_killed_at_start() { damage_while "$1" "$2" 'pgrep -x xenfold-ssh >/dev/null' damage_kill; lab_daemon start; }
damage_killed_in_stream() { damage_while "$1" "$2" "grep -qs 'pass 1, [1-9]' /root/damage.log" damage_kill; lab_daemon start; }
damage_killed_at_end() { damage_while "$1" "$2" "grep -qs 'pass 2,' /root/damage.log" damage_kill; lab_daemon start; }
damage_stop() { lab_daemon stop; }
damage_stopped_in_stream() { damage_while "$1" "$2" "grep -qs 'pass 1, [1-9]' /root/damage.log" damage_stop; lab_daemon start; }

# The destination knows contents of a guest that runs there, and half of its frames are others by the time they are asked
# for. Its store knows nothing.
damage_overwritten() {
  local to=$2 sibling=damage-sib
  on "$to" "systemctl stop xenfoldd; find $STORE -name 'pack-*' -delete -o -name index.redb -delete; systemctl start xenfoldd" </dev/null
  guest_create $sibling --on "$to"
  on "$to" "xl pause $sibling" </dev/null
  indexed "$to" $sibling
  cargo build --quiet --locked --release --manifest-path "$REPO/Cargo.toml" -p xen-sys --example scribble
  lab_cp "${CARGO_TARGET_DIR:-$REPO/target}/release/examples/scribble" "$to:/root/scribble"
  DAMAGE_TO=$to damage_while "$1" "$to" "grep -qs 'pass 1, [1-9]' /root/damage.log" damage_scribble
  guest_destroy $sibling
}

damage_scribble() { on "$DAMAGE_TO" '/root/scribble $(xl domid damage-sib)' </dev/null >&2; }

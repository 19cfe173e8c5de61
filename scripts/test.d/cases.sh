# shellcheck shell=bash
# The lab steps. Each leaves one copy of its guest, well and on either host, for the next.

# What the figures of a migration must show (see figures in lab.sh).
COMPLETED='f["completed"] and f["error"] is None and f["mode"] == "xenfold"'
SAVED='f["wire_bytes"] < f["stream_bytes"] / 2 and f["pages"]["zero"] > 0 and f["pages"]["reference"] > 0'
VERIFIED='f["verify"]["equal_pages"] * 4096 > f["memory_total_bytes"] * 0.9'

# xen-sys against a running Xen, with the crate xenctrl as an independent opinion (xen-sys/tests/lab.rs).
lab_xen_sys() {
  local target=${CARGO_TARGET_DIR:-target} binary
  binary=$(RUSTFLAGS='--cfg xenfold_oracle' CARGO_TARGET_DIR=$target/oracle cargo test --locked --no-run -p xen-sys --test lab \
    --message-format json | sed -n 's/.*"name":"lab".*"executable":"\([^"]*\)".*/\1/p')
  have_guest ci
  # The tests create a second guest from the first one's configuration, which is where it was created.
  if [ "$(lab guest where ci)" = b ]; then migrate b ci; fi
  lab cp "$binary" a:/root/xen-sys-lab
  on a XEN_SYS_GUEST=ci /root/xen-sys-lab --ignored --nocapture
  must_be_well_on a ci
}

lab_there_and_back() {
  local from
  have_guest ci
  from=$(lab guest where ci)
  for from in "$from" "$(other "$from")"; do
    migrate "$from" ci --verify
    said "$from"
    figures "$from" "$COMPLETED" "$SAVED" "$VERIFIED"
    must_be_well_on "$(other "$from")" ci
  done
}

lab_peer_without_xenfold() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  on "$to" 'mv /usr/local/bin/xenfold /usr/local/bin/xenfold.away'
  if migrate "$from" ci --no-fallback; then die '--no-fallback did not fail'; fi
  must_say "$from" 'migrate without --no-fallback'
  must_be_well_on "$from" ci
  migrate "$from" ci
  must_say "$from" 'sending as plain xl does'
  on "$to" 'mv /usr/local/bin/xenfold.away /usr/local/bin/xenfold'
  must_be_well_on "$to" ci
}

lab_destination_agent_killed() {
  local from
  have_guest ci
  from=$(lab guest where ci)
  start_migration "$from" ci
  in_the_stream "$from"
  on "$(other "$from")" 'pkill -KILL -x xenfold'
  must_fail
  must_say "$from" 'Try again with the same command'
  must_have_stayed "$from" ci
}

lab_link_cut() {
  local from
  have_guest ci
  from=$(lab guest where ci)
  start_migration "$from" ci --timeout 5
  in_the_stream "$from"
  lab link cut
  must_fail
  # The cable is still out; its own host hears the guest.
  lab guest check ci
  lab link restore
  must_have_stayed "$from" ci
}

lab_ctrl_c() {
  local from pid
  have_guest ci
  from=$(lab guest where ci)
  start_migration "$from" ci
  in_the_stream "$from"
  # Each xl create that waits for its guest's end is an xl, too.
  # Its process group has its number.
  pid=$(on "$from" 'pgrep -ax xl' | sed -n 's/^\([0-9]*\) [^ ]*xl migrate .*/\1/p')
  on "$from" "kill -INT -- -$pid"
  must_fail
  within 60 agent_has_ended "$from"
  must_say "$from" 'xl was ended'
  must_have_stayed "$from" ci
}

# From another terminal, early and late.
lab_abort() {
  local from moment
  have_guest ci
  from=$(lab guest where ci)
  if on "$from" 'xenfold abort ci'; then die 'a guest that is not being migrated was aborted'; fi
  for moment in first ': pass 1,' ': pass [2-9],'; do
    start_migration "$from" ci
    # Refused until the agent is there.
    [ "$moment" = first ] || within 300 log_has "$from" "$moment"
    if [ "$moment" = ': pass 1,' ]; then on "$from" 'xenfold jobinfo ci && xenfold jobinfo ci --json' | grep '"iteration":1,'; fi
    within 30 on "$from" 'xenfold abort ci >/root/abort.log'
    on "$from" 'grep "runs on here" /root/abort.log'
    must_fail
    must_be_well_on "$from" ci
    on "$from" 'if ls /run/xenfold/* 2>/dev/null; then exit 1; fi'
  done
  must_have_stayed "$from" ci
}

# Nobody hears xl and the agent any more.
lab_closed_terminal() {
  local from
  have_guest ci
  from=$(lab guest where ci)
  lab rate 20
  say "migrate ci from $from to $(other "$from") in a terminal, to be closed"
  on "$from" "rm -f /root/migrate.log; script -qefc 'xl migrate -s xenfold-ssh ci $(other "$from")' /root/migrate.log </dev/null >/dev/null 2>&1" &
  migration=$!
  in_the_stream "$from"
  on "$from" 'pkill -KILL -x script'
  must_fail
  within 60 agent_has_ended "$from"
  on "$from" 'if ls /run/xenfold/*.json 2>/dev/null; then exit 1; fi'
  must_have_stayed "$from" ci
}

# The agent dies when GO has left its host and nothing has come back: at most one copy may run, and `xenfold resume`
# knows which.
lab_source_agent_killed() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  start_migration "$from" ci
  within 300 log_has "$from" ': pass [2-9],'
  # A way of 1.5 s stretches the moment: the agent's question whether the other host is there, then GO.
  on "$from" 'tc qdisc add dev link0 parent 1:10 netem delay 1500ms limit 100000'
  on "$from" 'until grep -q "permission to start" /root/migrate.log; do pgrep -x xenfold-ssh >/dev/null || exit 1; sleep 0.1; done
    sleep 2; pkill -KILL -x xenfold-ssh'
  must_fail
  said "$from"
  within 60 source_is_left_suspended "$from" ci
  # The destination, if it still had to hear GO, needs its time to notice and to clean up.
  within 60 destination_has_settled "$to" ci
  if on "$from" 'xenfold resume ci >/root/migrate.log 2>&1'; then
    say "GO had not left $from"
    must_be_well_on "$from" ci
  else
    say "GO had left $from: $to owns the guest"
    must_say "$from" "$to holds guest ci--migratedaway and owns it"
    lab guest check ci
    # A guest that was started there and is gone may have written to its disk: nobody but its owner can forget that.
    on "$to" 'xl destroy ci'
    if on "$from" 'xenfold resume ci >/root/migrate.log 2>&1'; then die 'a guest that ran elsewhere was resumed'; fi
    must_say "$from" 'has ended there or moved on'
    on "$from" 'xenfold resume ci --force'
    must_be_well_on "$from" ci
  fi
  from=$(lab guest where ci)
  migrate "$from" ci
  must_be_well_on "$(other "$from")" ci
}

source_is_left_suspended() { [[ $(copies "$1" "$2") == "$2--migratedaway "*s* ]]; }

destination_has_settled() { [[ $(copies "$1" "$2") != *--incoming* ]]; }

# Both hosts keep what the guest's pages held: its way back is nearly free, also when the daemon is killed on the way.
lab_return_trip() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  lab daemon forget
  lab daemon start
  migrate "$from" ci
  figures "$from" "$COMPLETED" 'f["pages"]["known"] == 0'
  must_be_well_on "$to" ci
  migrate "$to" ci --verify
  said "$to"
  figures "$to" "$COMPLETED" "$VERIFIED" 'f["pages"]["known"] > 1000' 'f["wire_bytes"] < f["stream_bytes"] / 20'
  must_be_well_on "$from" ci
  start_migration "$from" ci
  in_the_stream "$from"
  on "$to" 'systemctl kill -s KILL xenfoldd'
  wait "$migration" || { said "$from"; die 'the migration failed with its daemon'; }
  lab rate none
  figures "$from" "$COMPLETED"
  must_be_well_on "$to" ci
  on "$to" 'systemctl is-active xenfoldd && xenfold store verify'
  lab daemon forget
}

lab_hvm_guest() { other_kind hvm; }

# Needs shadow paging, which Debian's hypervisor lacks.
lab_pv_guest() {
  other_kind pv --mode postcopy
  # Of this kind none can follow: it went whole.
  must_say a 'none of it can follow: it is a PV guest'
}

# A host has one processor: the guest of the other steps would slow the start of these to minutes.
without_other_guests() {
  if lab guest where ci >/dev/null 2>&1; then lab guest destroy ci; fi
}

other_kind() { # TYPE [OPTIONS of xenfold-ssh]
  without_other_guests
  lab guest create "ci-$1" --type "$1" --on a
  migrate a "ci-$1" "${@:2}"
  figures a "$COMPLETED" "$SAVED"
  must_be_well_on b "ci-$1"
  lab guest destroy "ci-$1"
}

lab_debian_guest() {
  without_other_guests
  # To fill its page cache takes longer than all else here.
  lab guest create ci-debian --kind debian --on a --without cache
  migrate a ci-debian --verify
  said a
  figures a "$COMPLETED" "$SAVED" "$VERIFIED"
  must_be_well_on b ci-debian
  lab guest destroy ci-debian
}

# Pages held back, and the dirty bitmap read beside xl.
lab_hold() {
  without_other_guests
  lab hold 3
  lab guest destroy hold
}

# Migrations back and forth, some killed at a random moment.
lab_soak() {
  without_other_guests
  lab soak 4
}

# Pages that follow the guest: nearly all, compared with the source's while it stays paused; then while it runs; then what
# is missing after pre-copy. Needs paging, which Debian's hypervisor lacks.
lab_pages_follow() {
  local from to followed='f["completed"] and f["error"] is None and f["late"]["missing"] == 0'
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  say "migrate ci from $from to $to and leave it paused"
  on "$from" "xl migrate -p -s 'xenfold-ssh --mode postcopy --verify --stats /root/stats.json' ci $to >/root/migrate.log 2>&1" || {
    said "$from"
    die 'the migration failed'
  }
  figures "$from" "$followed" 'f["late"]["verified_pages"] > 40000 and f["late"]["different_pages"] == 0'
  on "$to" 'xl unpause ci'
  must_be_well_on "$to" ci
  migrate "$to" ci --mode postcopy
  said "$to"
  figures "$to" "$followed" 'f["mode"] == "postcopy"' 'f["late"]["pages"] > 40000' 'f["late"]["early"] > 0' \
    'f["late"]["fetched"] < f["late"]["pages"] * 0.1' # more the longer it takes
  must_be_well_on "$from" ci
  migrate "$from" ci --mode hybrid --downtime-limit 1
  figures "$from" "$followed" 'f["mode"] == "hybrid"'
  must_be_well_on "$to" ci
}

# The link is cut for some seconds while pages follow the guest: it stands still, its source connects again by itself, and xl
# never hears of it. Emulated hosts take half a minute for an ssh; on others it is seconds.
lab_cut_while_pages_follow() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  start_migration "$from" ci --mode postcopy
  within 300 log_has "$from" ': runs on '
  on "$to" 'xenfold jobinfo ci' | grep 'runs here'
  if on "$from" 'xenfold abort ci >/root/abort.log 2>&1'; then die 'a guest that runs elsewhere was aborted'; fi
  on "$from" "grep 'too late: guest ci runs on $to' /root/abort.log"
  # With pages missing it goes nowhere else.
  if on "$to" "xl migrate -s xenfold-ssh ci $from >/root/migrate.log 2>&1"; then die 'it went on with pages missing'; fi
  must_say "$to" 'have not come yet from where it was before: .* It is untouched and runs on here'
  lab link cut
  within 60 log_has "$from" 'no connection for'
  # The cable is out; each host is still reached from here.
  on "$from" 'xenfold jobinfo ci' | grep 'stands still on '
  within 60 on "$to" 'xenfold jobinfo ci | grep "stands still here"'
  [[ $(copies "$to" ci) == "ci "*p* ]] || die 'the guest is not held still'
  sleep 5
  lab link restore
  within 180 log_has "$from" 'connected again after'
  lab rate none
  wait "$migration" || { said "$from"; die 'the migration failed'; }
  said "$from"
  figures "$from" 'f["completed"] and f["error"] is None and f["late"]["missing"] == 0' 'f["late"]["outages"] >= 1' \
    'f["late"]["outage_ms"] > 5000'
  must_be_well_on "$to" ci
  on "$to" 'if ls /run/xenfold/*.rejoin /run/xenfold/*.arriving 2>/dev/null; then exit 1; fi'
}

# One of the two is destroyed while pages follow: the guest where it runs, which ends as with plain xl, or its suspended copy,
# without which it cannot go on.
lab_ended_while_pages_follow() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  start_migration "$from" ci --mode postcopy
  within 300 log_has "$from" ': runs on '
  on "$to" 'xl destroy ci'
  wait "$migration" || { said "$from"; die 'the end of the guest was taken for a failure'; }
  [ -z "$(copies a ci)$(copies b ci)" ] || die 'something of the guest is left'

  have_guest ci --on "$from"
  start_migration "$from" ci --mode postcopy
  within 300 log_has "$from" ': runs on '
  on "$from" 'xl destroy ci--migratedaway'
  must_fail
  must_say "$from" 'ci cannot go on on .*was destroyed'
  [[ $(copies "$to" ci) == "ci "*p* ]] || die 'the guest is not held still'
  # No daemon runs here, which it says as well.
  on "$to" 'xenfold status || true' | grep 'GUEST ci lacks'
  on "$to" 'xl destroy ci'
  within 30 on "$to" 'if ls /run/xenfold/*.rejoin /run/xenfold/*.arriving 2>/dev/null; then exit 1; fi'
}

# Stock xl takes the guest while pages of it are missing: live, back to where they are, so that it has passed over some before
# they come; then into a file. The guest's own checker finds what is lost.
lab_stock_save_while_pages_follow() {
  local from to
  have_guest ci
  from=$(lab guest where ci)
  to=$(other "$from")
  late_and_slow "$from"
  on "$to" "xl migrate ci $from >/root/stock.log 2>&1" || { on "$to" 'cat /root/stock.log' >&2; die 'stock xl migrate failed'; }
  taken_whole "$from"
  must_be_well_on "$from" ci
  late_and_slow "$from"
  on "$to" 'xl save ci /root/ci.save >/root/stock.log 2>&1' || { on "$to" 'cat /root/stock.log' >&2; die 'stock xl save failed'; }
  taken_whole "$from"
  on "$to" 'xl restore /root/ci.save && rm /root/ci.save'
  must_be_well_on "$to" ci
}

# Some of the guest is still to come, and not soon: no more than an emulated host takes in while xl is held up.
late_and_slow() { # FROM
  start_migration "$1" ci --mode postcopy --bandwidth 1
  within 300 log_has "$1" ': runs on '
  within 600 lacks_fewer "$(other "$1")" 14000
  # xl is quicker than what is left.
  lab rate none
}

lacks_fewer() { # HOST PAGES
  local missing
  missing=$(on "$1" 'xenfold status 2>/dev/null' | sed -n 's/.*GUEST ci lacks \([0-9]*\) pages.*/\1/p')
  [ "${missing:-$2}" -lt "$2" ]
}

# All came in time; otherwise what is lost is said, which is of no use here.
taken_whole() { # FROM
  wait "$migration" || { said "$1"; die 'the migration failed'; }
  must_say "$1" 'it stands still until they have come'
  if log_has "$1" 'LACKS THEM'; then
    said "$1"
    die 'xl took the guest before its pages had come, as README says that it may: the link is too slow for this step'
  fi
}

# Two cuts, and two kills of xenfold on either host, at random moments while pages follow the guest.
lab_disturbed_while_pages_follow() {
  without_other_guests
  lab follow 6 --memory 128
}

# Frames that guests share while they write to them, with the daemon killed and a guest destroyed on the way: no wrong byte,
# and the table is what Xen counts. Needs sharing, which Debian's hypervisor lacks.
lab_share() {
  local host
  without_other_guests
  lab races 200 --seconds 600
  lab daemon forget
  for host in a b; do on "$host" 'rm /etc/xen/xenfold.conf'; done
}

# Where the hypervisor cannot page the guest goes whole, and the reason is said.
lab_none_can_follow() {
  local from
  have_guest ci
  from=$(lab guest where ci)
  on "$from" "xenfold doctor $(other "$from")" | grep 'precopy only: this hypervisor cannot leave pages behind'
  migrate "$from" ci --mode postcopy
  must_say "$from" 'none of it can follow: .*MEM_PAGING'
  figures "$from" "$COMPLETED" "$SAVED"
  must_be_well_on "$(other "$from")" ci
}

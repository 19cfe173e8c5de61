# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# Guests that write race the daemon: to pages while they are compared, and to pages that are shared. Then the same on a host
# without free memory.

# lab races N: until so many writes met sharing, on host a, hypervisor `paging`. Needs the programs of `lab push`.
lab_races() {
  local wanted=1000 seconds=1800 memory=128 rate=150 json='' n guests=(race-1 race-2) begin races kills=0 killed_at=0 ended=0
  local before=0 work result
  while [ $# -gt 0 ]; do
    case $1 in
      --seconds) seconds=${2:-}; shift ;;
      --memory) memory=${2:-}; shift ;;
      --rate) rate=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      -*) die "races: unknown option '$1'" ;;
      *) wanted=$1 ;;
    esac
    shift
  done
  must_run a
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'races: needs scripts/lab up --hypervisor paging'
  rm -rf "$STATE"/races.* # of a run that failed
  work=$(mktemp -d "$STATE/races.XXXXXX")
  lab_groups 'store_size = 0' 'index_rate = 100000000' 'index_processor = 0' 'sharing = true' 'sharing_reserve = "64MiB"' '[group]' 'lab = ["race-*"]'
  for n in "${guests[@]}"; do
    guest_create "$n" --kind small --on a --memory "$memory" --check 4 --race "$rate" --racing 16
  done
  begin=$SECONDS
  # A guest is gone through twice for each time that it is asked for: what stays meanwhile is shared, and broken by a write.
  while :; do
    for n in "${guests[@]}"; do share_scan "$n"; done
    sleep 20
    # A daemon that is killed takes its counts with it.
    races=$((before + $(races_now)))
    say "$races races after $((SECONDS - begin)) s, $(dedup_figure pages) pages shared, $kills daemons killed"
    [ "$races" -lt "$wanted" ] || [ $kills -lt 1 ] || break
    [ $((SECONDS - begin)) -lt "$seconds" ] || die "races: $races of $wanted after $seconds s"
    if [ $((races - killed_at)) -ge $((wanted / 4)) ] && [ "$(dedup_figure pages)" -gt 500 ]; then
      say 'the daemon is killed'
      on a 'systemctl kill -s KILL xenfoldd' </dev/null
      kills=$((kills + 1)) before=$races killed_at=$races
    fi
    if [ $ended = 0 ] && [ "$races" -ge $((wanted / 2)) ]; then
      say 'a guest is destroyed while it is gone through'
      guest_create race-3 --kind small --on a --memory "$memory" --check 4 --race "$rate" --no-wait
      share_scan race-3
      sleep 10
      guest_destroy race-3
      ended=1
    fi
  done
  for n in "${guests[@]}"; do races_right "$n"; done
  # Nobody writes: the table is what Xen counts.
  for n in "${guests[@]}"; do on a "xl pause $n" </dev/null; done
  for n in "${guests[@]}"; do share_scan "$n"; done
  races_table_settles
  on a 'xenfold dedup status --json' </dev/null >"$work/dedup.json"
  for n in "${guests[@]}"; do on a "xl unpause $n" </dev/null; done
  on a 'xenfold dedup disable' </dev/null >&2 || die 'not all pages went back to their guests'
  [ "$(dedup_figure xen_saved_pages)" = 0 ] || die 'Xen still spares frames after disable'
  for n in "${guests[@]}"; do races_right "$n"; done
  for n in "${guests[@]}"; do guest_destroy "$n"; done
  result=$(printf '{"races": %s, "seconds": %s, "daemons_killed": %s, "guests_destroyed": %s, "table_saved": %s, "xen_saved": %s}' \
    "$races" $((SECONDS - begin)) $kills $ended "$(races_figure "$work" saved_pages)" "$(races_figure "$work" xen_saved_pages)")
  echo "$result"
  [ -z "$json" ] || echo "$result" >"$json"
  rm -r "$work"
}

# Writes that met a page which was nominated or shared.
races_now() { echo $(($(dedup_figure broken) + $(dedup_figure changed))); }

races_figure() { sed -n "s/^  \"$2\": \([0-9]*\),*$/\1/p" "$1/dedup.json"; }

# Both of a guest's programs that know what its memory has to hold say that it does.
races_right() { # GUEST
  guest_check "$1" 300 >&2 || die "guest $1 is damaged"
  on a "lab-guest listen --name $1-race --passes 2 --seconds 120" </dev/null >&2 || die "a page of guest $1 that was raced for is damaged"
}

races_table_settles() {
  local begin=$SECONDS
  until [ "$(dedup_figure saved_pages)" = "$(dedup_figure xen_saved_pages)" ]; do
    [ $((SECONDS - begin)) -lt 180 ] || die "the table says $(dedup_figure saved_pages), Xen $(dedup_figure xen_saved_pages)"
    sleep 5
  done
}

# lab exhaust: two guests share, all free memory of the host goes to others, and both write to what they share.
lab_exhaust() {
  local memory=128 json='' n guests=(race-1 race-2) begin free fills=0 stood standing result
  while [ $# -gt 0 ]; do
    case $1 in
      --memory) memory=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      *) die "exhaust: unknown option '$1'" ;;
    esac
    shift
  done
  must_run a
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'exhaust: needs scripts/lab up --hypervisor paging'
  # The lowest mark, so that writes come to its end.
  lab_groups 'store_size = 0' 'index_rate = 100000000' 'index_processor = 0' 'sharing = true' 'sharing_reserve = "1MiB"' '[group]' 'lab = ["race-*"]'
  for n in "${guests[@]}"; do
    # Slowly at first: a racer writes what it reads about never again within the time that this takes.
    guest_create "$n" --kind small --on a --memory "$memory" --check 4 --race 20 --racing 32
  done
  begin=$SECONDS
  # More than is left free below.
  until [ "$(dedup_figure saved_pages)" -gt 25000 ]; do
    [ $((SECONDS - begin)) -lt 400 ] || die "only $(dedup_figure saved_pages) frames are spared"
    for n in "${guests[@]}"; do share_scan "$n"; done
    sleep 10
  done
  say "$(dedup_figure saved_pages) frames are spared after $((SECONDS - begin)) s"
  # Guests that are never run take what is free; Xen wants some of it for each of them.
  while free=$(on a 'xl info free_memory' </dev/null) && [ "$free" -gt 64 ] && [ $fills -lt 6 ]; do
    fills=$((fills + 1))
    races_fill $fills $((free - free / 32 - 16))
  done
  say "$(on a 'xl info free_memory' </dev/null) MiB are free after $fills guests that take the rest"
  # Going back to their guests pages take all but the last frames; writes take those.
  on a 'xenfold dedup disable --no-wait' </dev/null >&2
  begin=$SECONDS
  while :; do
    stood=$(dedup_figure stood) standing=$(dedup_figure standing)
    say "free $(dedup_figure free_bytes) bytes; processors stood still $stood times, $standing do now"
    if [ "$standing" -gt 0 ] || [ $((SECONDS - begin)) -ge 240 ]; then break; fi
    sleep 10
  done
  for n in "${guests[@]}"; do on a "xl domid $n" </dev/null >/dev/null || die "guest $n is gone: $(on a 'xl dmesg | tail -n 20' </dev/null)"; done
  # A new daemon hears of them, too.
  on a 'systemctl kill -s KILL xenfoldd' </dev/null
  sleep 15
  say "after a new daemon: processors stood still $(dedup_figure stood) times, $(dedup_figure standing) do now"
  for ((n = 1; n <= fills; n++)); do on a "xl destroy fill-$n 2>/dev/null" </dev/null || true; done
  for n in "${guests[@]}"; do races_right "$n"; done
  result=$(printf '{"stood": %s, "standing_before": %s, "standing_after": %s}' "$stood" "$standing" "$(dedup_figure standing)")
  for n in "${guests[@]}"; do guest_destroy "$n"; done
  echo "$result"
  [ -z "$json" ] || echo "$result" >"$json"
  [ "$stood" -gt 0 ] || die 'exhaust: no write came to the end of memory'
}

# A guest of so many MiB that is paused.
races_fill() { # NUMBER MIB
  on a "sed -e 's/^name = .*/name = \"fill-$1\"/' -e 's/^memory = .*/memory = $2/' -e '/^vif/d' /root/guests/race-1.cfg >/root/guests/fill-$1.cfg
    xl create -p -q /root/guests/fill-$1.cfg" </dev/null || say "no guest of $2 MiB more"
}

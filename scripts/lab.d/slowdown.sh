# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# What the daemon costs a guest that compiles, in pairs: with it scanning and sharing at its default pace, and without it.

# lab slowdown: host a, hypervisor `paging`, whose one processor the guest has for itself but for dom0. It shares pages with
# itself. Needs the programs of `lab push`.
lab_slowdown() {
  local pairs=4 seconds=180 memory=384 json='' work guest=slow pair phase
  while [ $# -gt 0 ]; do
    case $1 in
      --pairs) pairs=${2:-}; shift ;;
      --seconds) seconds=${2:-}; shift ;;
      --memory) memory=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      *) die "slowdown: unknown option '$1'" ;;
    esac
    shift
  done
  must_run a
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'slowdown: needs scripts/lab up --hypervisor paging'
  rm -rf "$STATE"/slowdown.* # of a run that failed
  work=$(mktemp -d "$STATE/slowdown.XXXXXX")
  lab_groups 'store_size = 0' 'sharing = true' 'sharing_reserve = "64MiB"' '[group]' 'lab = ["slow"]'
  guest_create $guest --kind debian --on a --memory "$memory" --check 4 --without compiler --without database --without web \
    --without cache
  guest_load $guest compile-same
  # Each program that it has compiled, with the host's time.
  printf '%s\n' '#!/bin/bash' 'tail -n 0 -F "$1" 2>/dev/null | while read -r line; do' \
    '  [[ $line != *"guest compiled: "* ]] || echo "$EPOCHREALTIME ${line##*: }" | tr -d "\r"' 'done >/root/compiled' |
    on a 'cat >/root/compiled.sh'
  on a "setsid bash /root/compiled.sh /var/log/xen/console/guest-$guest.log >/dev/null 2>&1 & echo \$! >/root/compiled.pid" </dev/null
  # What the first ones need is read from the disk.
  until [ "$(on a 'wc -l </root/compiled' </dev/null)" -ge 10 ]; do sleep 10; done
  for ((pair = 1; pair <= pairs; pair++)); do
    # What changes with time is the same for both.
    for phase in $( ((pair % 2)) && echo without with || echo with without); do slowdown_phase "$phase"; done
  done
  on a 'kill -- "-$(cat /root/compiled.pid)"; cat /root/compiled' </dev/null >"$work/compiled"
  on a 'systemctl start xenfoldd; xenfold dedup disable' </dev/null >&2 || die 'not all pages went back to their guests'
  guest_check $guest 300 >&2 || die "guest $guest is damaged"
  guest_destroy $guest
  lab_daemon forget
  slowdown_result "$work" | tee "$work/result.json"
  [ -z "$json" ] || cp "$work/result.json" "$json"
  rm -r "$work"
}

slowdown_phase() { # with|without
  case $1 in
    with)
      on a 'systemctl start xenfoldd' </dev/null
      share_scan "$guest"
      slowdown_settles
      ;;
    without)
      on a 'systemctl start xenfoldd; xenfold dedup disable' </dev/null >&2 || die 'not all pages went back to their guests'
      on a 'systemctl stop xenfoldd' </dev/null
      ;;
  esac
  sleep 5
  local begin end ticks
  # Seconds since the epoch, and of processor time that Xen has given to the guest.
  begin=$(on a "date +%s.%N; xl list $guest | awk 'NR == 2 { print \$NF }'" </dev/null)
  ticks=$(emulator_ticks)
  sleep "$seconds"
  ticks=$(($(emulator_ticks) - ticks))
  end=$(on a "date +%s.%N; xl list $guest | awk 'NR == 2 { print \$NF }'" </dev/null)
  echo "$1 ${begin//$'\n'/ } ${end//$'\n'/ } $((ticks * 1000 / $(getconf CLK_TCK))) $([ "$1" = without ] || { dedup_figure pages; dedup_figure broken; } | tr '\n' ' ')" >>"$work/phases"
  say "slowdown: $1 the daemon: $(tail -n 1 "$work/phases")"
}

# The processor time that host a has had on this machine: what others take from it is not its guest's loss.
emulator_ticks() {
  local stat
  stat=$(cat "/proc/$(cat "$STATE/a.pid")/stat")
  # Without the command, which may hold spaces, utime and stime are the 12th and the 13th (proc(5)).
  awk '{ print $12 + $13 }' <<<"${stat##*) }"
}

# Waits until the scan that was asked for is over: nothing further is shared, and the scanner goes at its own pace again.
slowdown_settles() {
  local begin=$SECONDS before=-1 now
  while now=$(dedup_figure pages) && [ "$now" -lt 1000 ] || [ $((now - before)) -gt $((now / 200)) ]; do
    [ $((SECONDS - begin)) -lt 900 ] || die "slowdown: sharing does not come to rest: $(on a 'xenfold dedup status' </dev/null)"
    before=$now
    sleep 30
  done
}

slowdown_result() { # WORK
  python3 - "$1" <<'P'
import json, statistics, sys
work = sys.argv[1]
compiled = [(float(t), int(n)) for t, n in (line.split() for line in open(f"{work}/compiled"))]
phases = []
for line in open(f"{work}/phases"):
    name, begin, had_before, end, had_after, emulator_ms, *more = line.split()
    inside = [(t, n) for t, n in compiled if float(begin) <= t <= float(end)]
    if len(inside) < 5:
        sys.exit(f"only {len(inside)} programs were compiled in a phase: longer ones are needed (--seconds)")
    (t, n), (u, m) = inside[0], inside[-1]
    a_minute, seconds = 60 * (m - n) / (u - t), float(end) - float(begin)
    emulated, share = int(emulator_ms) / 1000 / seconds, 100 * (float(had_after) - float(had_before)) / seconds
    phases.append((name, {"wall": a_minute, "processor": a_minute / emulated, "share": share}, [int(x) for x in more]))
pairs = [dict((name, rates) for name, rates, _ in phases[i:i + 2]) for i in range(0, len(phases), 2)]
result = {"shared_pages_and_written": [more for _, _, more in phases if more]}
# Programs by the clock, and by the processor time that the emulated host has had; and the part of that host's processor that the
# guest has had, which does not depend on how fast it is emulated.
for by in "wall", "processor", "share":
    slower = [100 * (1 - pair["with"][by] / pair["without"][by]) for pair in pairs]
    without = [pair["without"][by] for pair in pairs]
    result[by] = {
        "percent" if by == "share" else "programs_a_minute": [{name: round(rates[by], 2) for name, rates in pair.items()} for pair in pairs],
        "slower_percent": [round(x, 2) for x in slower],
        "slower_percent_mean": round(statistics.mean(slower), 2),
        "slower_percent_median": round(statistics.median(slower), 2),
    }
    if len(pairs) > 1:
        result[by]["standard_error"] = round(statistics.stdev(slower) / len(slower) ** 0.5, 2)
        result[by]["noise_percent"] = round(100 * statistics.stdev(without) / statistics.mean(without), 2)
print(json.dumps(result, indent=1))
P
}

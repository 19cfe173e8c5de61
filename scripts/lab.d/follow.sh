# shellcheck shell=bash
# lab follow: migrations whose pages follow the guest, disturbed while they do. The guest is never lost, no byte is wrong.

FOLLOW_GUEST=follow

# lab follow N: so many disturbances at random moments, each a cut of the cable for 1 to 30 s, xenfold killed where the guest
# runs, or xenfold-ssh killed where its memory is. Needs the programs of `lab push`; hypervisor `paging`.
lab_follow() {
  local wanted=0 seed=$RANDOM memory=128 kinds=cut,destination,source json='' work round=0 from to
  while [ $# -gt 0 ]; do
    case $1 in
      --seed) seed=${2:-}; shift ;;
      --memory) memory=${2:-}; shift ;;
      --only) kinds=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      -*) die "follow: unknown option '$1'" ;;
      *) wanted=$1 ;;
    esac
    shift
  done
  [[ $wanted =~ ^[1-9][0-9]*$ ]] || die 'usage: lab follow N [--seed SEED] [--memory MIB] [--only cut,destination,source]'
  must_run a
  must_run b
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'follow: needs scripts/lab up --hypervisor paging'
  IFS=, read -ra kinds <<<"$kinds"
  say "follow: $wanted disturbances, seed $seed (the same seed disturbs in the same way)"
  RANDOM=$seed
  rm -rf "$STATE"/follow.* # of a run that failed
  work=$(mktemp -d "$STATE/follow.XXXXXX")
  : >"$work/done"
  guest_host $FOLLOW_GUEST >/dev/null || guest_create $FOLLOW_GUEST --memory "$memory"
  # Slow enough that a moment while pages follow can be hit.
  lab_rate 20
  while [ "$(wc -l <"$work/done")" -lt "$wanted" ]; do
    round=$((round + 1))
    from=$(guest_where $FOLLOW_GUEST)
    to=$([ "$from" = a ] && echo b || echo a)
    follow_migrate "$from" "$to" "$round"
  done
  lab_rate none
  guest_destroy $FOLLOW_GUEST
  follow_result "$work/done" "$round" | tee "$work/result.json"
  [ -z "$json" ] || cp "$work/result.json" "$json"
  rm -r "$work"
}

# One migration, disturbed as often as it lasts.
follow_migrate() { # FROM TO ROUND
  local from=$1 to=$2 round=$3 migration status=0 source_killed=0
  on "$from" 'rm -f /root/follow.log; touch /root/follow.log' </dev/null
  on "$from" "xl migrate -s 'xenfold-ssh --mode postcopy' $FOLLOW_GUEST $to >/root/follow.log 2>&1" </dev/null &
  migration=$!
  until follow_says "$from" ': runs on '; do
    kill -0 $migration 2>/dev/null || break
    sleep 1
  done
  while kill -0 $migration 2>/dev/null && [ "$(wc -l <"$work/done")" -lt "$wanted" ]; do
    sleep $((2 + RANDOM % 15)).$((RANDOM % 10))
    # In turn. The time is drawn in any case: the same seed then means the same moments.
    follow_disturb "${kinds[$(wc -l <"$work/done") % ${#kinds[@]}]}" $((1 + RANDOM % 30)) "$from" "$to"
  done
  wait $migration || status=$?
  if [ $status != 0 ]; then
    # A sender that was killed when all had come has left its copy only; nobody else may end like that.
    if [ $source_killed = 0 ] || on "$from" "xenfold resume $FOLLOW_GUEST" </dev/null >&2; then
      on "$from" 'tail -n 40 /root/follow.log' </dev/null >&2
      die "follow: migration $round failed (status $status)"
    fi
    on "$from" "xl destroy $FOLLOW_GUEST--migratedaway" </dev/null
  fi
  follow_judge "$from" "$to" "$round"
}

follow_says() { on "$1" "grep -q '$2' /root/follow.log" </dev/null; }

follow_count() { on "$1" "grep -c 'connected again after' /root/follow.log || true" </dev/null; }

# Waits on HOST until it was connected again once more than BEFORE times, at most 10 minutes. Asking again and again would take
# the processor of a host that is about to connect. What is left of `tail` for a moment must not hold the connection.
follow_again() { # HOST BEFORE
  on "$1" "timeout 600 bash -c 'grep -m $(($2 + 1)) \"connected again after\" < <(tail --pid=\$\$ -n +1 -f /root/follow.log 2>/dev/null)'" </dev/null >/dev/null
}

# Pages come, by what was said last.
follow_goes_on() { on "$1" "tail -n 1 /root/follow.log | grep -q ': runs on '" </dev/null; }

# Whoever sends the pages on HOST.
follow_sender() { on "$1" "pgrep -x xenfold-ssh || pgrep -f '^xenfold follow'" </dev/null >/dev/null; }

# Adds a line to $work/done when the disturbance met a guest that pages followed: what, and the milliseconds from when nothing
# stands in the way any more until the two have connected again.
follow_disturb() { # KIND SECONDS FROM TO
  local kind=$1 seconds=$2 from=$3 to=$4 begin again
  follow_sender "$from" || return 0
  follow_again "$from" "$(follow_count "$from")" &
  again=$!
  case $kind in
    cut)
      say "follow: the cable is out for $seconds s"
      lab_link cut
      sleep "$seconds"
      lab_link restore
      ;;
    destination)
      say "follow: xenfold is killed on $to"
      on "$to" 'pkill -KILL -x xenfold' </dev/null || return 0
      ;;
    source)
      say "follow: the sender on $from is killed, or ended as with Ctrl-C where it was typed"
      on "$from" "pkill -KILL -x xenfold-ssh || pkill -INT -f '^xenfold follow'" </dev/null || return 0
      # xl, where it was still there, ends with its warning, and what it has left is sent by another process; where it had been
      # told of the last page, it ends well.
      if wait "$migration"; then
        say "follow: $kind: the migration was over"
        return 0
      fi
      source_killed=1
      on "$from" "setsid -w xenfold follow $FOLLOW_GUEST >>/root/follow.log 2>&1" </dev/null &
      migration=$!
      ;;
    *) die "follow: no disturbance '$kind': cut, destination or source" ;;
  esac
  begin=$(date +%s%3N)
  while kill -0 $again 2>/dev/null; do
    if ! kill -0 "$migration" 2>/dev/null; then
      # All pages had come before it was noticed; or there was nothing left to go on with.
      say "follow: $kind: the migration was over"
      return 0
    fi
    if [ "$kind" = cut ] && [ $(($(date +%s%3N) - begin)) -gt 15000 ] && follow_goes_on "$from"; then
      echo "survived 0" >>"$work/done"
      say "follow: cut: the connection outlived it, $(wc -l <"$work/done") of $wanted"
      return 0
    fi
    [ $(($(date +%s%3N) - begin)) -lt 300000 ] || {
      on "$from" 'tail -n 40 /root/follow.log' </dev/null >&2
      die "follow: $kind: not connected again within 300 s"
    }
    sleep 0.1
  done
  wait $again || die "follow: $kind: $from cannot be asked"
  echo "$kind $(($(date +%s%3N) - begin))" >>"$work/done"
  say "follow: $kind: connected again after $(($(date +%s%3N) - begin)) ms, $(wc -l <"$work/done") of $wanted"
}

# Exactly one copy, on TO, its memory right and all of it there.
follow_judge() { # FROM TO ROUND
  local copies
  copies=$(for host in a b; do on "$host" xl list </dev/null | grep "^$FOLLOW_GUEST" | sed "s/^/$host /" || true; done)
  [[ $(wc -l <<<"$copies") = 1 && $copies == "$2 $FOLLOW_GUEST "* ]] || {
    on "$1" 'tail -n 40 /root/follow.log' </dev/null >&2
    die "follow: after migration $3 the guest is not just on $2: $copies"
  }
  guest_check $FOLLOW_GUEST 240 >/dev/null || die "follow: the guest's memory is wrong after migration $3"
  on "$1" 'if ls /run/xenfold/*.server 2>/dev/null; then exit 1; fi' </dev/null || die "follow: a journal is left on $1"
  say "follow: migration $3: guest on $2, memory right"
}

follow_result() { # DONE ROUNDS
  python3 - "$@" <<'P'
import json, statistics, sys
done = [line.split() for line in open(sys.argv[1])]
result = {"migrations": int(sys.argv[2]), "disturbances": len(done)}
for kind in sorted({kind for kind, _ in done}):
    times = sorted(int(ms) for of, ms in done if of == kind)
    result[kind] = {"count": len(times), "again_ms_median": statistics.median(times), "again_ms_longest": times[-1]}
print(json.dumps(result, indent=1))
P
}

# shellcheck shell=bash
# lab soak: migrations back and forth, one in five killed at a random moment, nothing lost and nothing doubled.

SOAK_GUEST=soak

lab_soak() {
  local count=${1:?usage: lab soak N [SEED]} seed=${2:-$RANDOM} round from=a to=b done_ok=0 killed=0
  must_run a
  must_run b
  say "soak: $count migrations, seed $seed (the same seed disturbs at the same moments)"
  RANDOM=$seed
  guest_host $SOAK_GUEST >/dev/null || guest_create $SOAK_GUEST
  # Slow enough that a moment inside a migration can be hit.
  lab_rate 50
  for ((round = 1; round <= count; round++)); do
    from=$(guest_where $SOAK_GUEST)
    to=b
    [ "$from" = a ] || to=a
    if ((round % 5 == 0 || (round == count && killed == 0))); then
      soak_killed "$from" "$to" "$round"
      killed=$((killed + 1))
    else
      soak_migrate "$from" "$to" || die "soak: migration $round failed; its words are above"
      soak_judge "$to" "$round"
      done_ok=$((done_ok + 1))
    fi
  done
  lab_rate none
  say "soak: $done_ok migrations, $killed killed on the way: no guest lost, none doubled, memory right each time"
}

soak_migrate() { # FROM TO
  on "$1" "xl migrate -s 'xenfold-ssh --timeout 10' $SOAK_GUEST $2 >/root/soak.log 2>&1" </dev/null || {
    on "$1" 'tail -n 30 /root/soak.log' </dev/null >&2
    return 1
  }
}

# Kills one of the processes of a migration at a random moment; the guest must then be on one side, whole, and a
# second migration must succeed.
soak_killed() { # FROM TO ROUND
  local from=$1 to=$2 round=$3 victim delay owner
  local victims=("$from xenfold-ssh" "$to xenfold" "$from xl" "$to libxl-save-helper" "$from ssh")
  victim=${victims[RANDOM % ${#victims[@]}]}
  delay=$((RANDOM % 25)).$((RANDOM % 10))
  say "soak: migration $round: ${victim#* } on ${victim% *} is killed after $delay s"
  on "$from" "xl migrate -s 'xenfold-ssh --timeout 10' $SOAK_GUEST $to >/root/soak.log 2>&1" </dev/null &
  local migration=$!
  sleep "$delay"
  soak_kill "$victim" "$from"
  wait $migration || true
  owner=$(soak_settle "$from" "$to")
  say "soak: migration $round: the guest is on $owner"
  soak_judge "$owner" "$round"
  soak_migrate "$owner" "$([ "$owner" = a ] && echo b || echo a)" ||
    die "soak: after migration $round was killed, the next one failed; its words are above"
}

soak_kill() { # "HOST PROCESS" FROM
  local host=${1% *} process=${1#* }
  case $process in
    # The xl of this migration and the ssh of its agent, not those that guests or this script keep.
    xl) on "$host" "pkill -KILL -f '^xl migrate'" </dev/null || true ;;
    ssh) on "$host" "pkill -KILL -P \"\$(pgrep -x xenfold-ssh)\"" </dev/null || true ;;
    # Linux keeps 15 characters of a name.
    *) on "$host" "pkill -KILL -x ${process:0:15}" </dev/null || true ;;
  esac
}

# Waits until both hosts have come to rest and prints the host that owns the guest. A guest that stands suspended at the
# source because nobody knows whether the other host runs it is repaired as its message says.
soak_settle() { # FROM TO
  local from=$1 to=$2 limit=$((SECONDS + 120))
  while ((SECONDS < limit)); do
    sleep 2
    ! on "$from" 'pgrep -x xenfold-ssh' </dev/null >/dev/null || continue
    ! on "$to" "xl list | grep -q '$SOAK_GUEST--incoming'" </dev/null || continue
    if on "$from" "xl list | grep -q '^$SOAK_GUEST.*--s'" </dev/null; then
      say "soak: the guest was left suspended on $from; xenfold resume"
      on "$from" "xenfold resume $SOAK_GUEST" </dev/null >&2 || on "$from" "xl destroy $SOAK_GUEST--migratedaway" </dev/null >&2 || true
    fi
    guest_host $SOAK_GUEST && return
  done
  on "$from" 'tail -n 30 /root/soak.log' </dev/null >&2
  die "soak: no host runs the guest, or $to still holds a part of it, two minutes after the migration was killed"
}

# Exactly one copy, on HOST, and its memory is right.
soak_judge() { # HOST ROUND
  local copies
  copies=$(for host in a b; do on "$host" xl list </dev/null | grep "^$SOAK_GUEST" | sed "s/^/$host /" || true; done)
  [ "$(wc -l <<<"$copies")" = 1 ] || die "soak: after migration $2 there is not one copy of the guest: $copies"
  [[ $copies == "$1 $SOAK_GUEST "* ]] || die "soak: after migration $2 the guest is not on $1: $copies"
  guest_check $SOAK_GUEST 240 >/dev/null || die "soak: the guest's memory is wrong after migration $2"
  say "soak: migration $2: guest on $1, memory right"
}

# shellcheck shell=bash
# What the lab steps are written in. The hosts are up; a guest is judged by Xen's list on both hosts and by its own
# memory checker.

lab() { scripts/lab "$@" </dev/null; }

on() { # a|b CMD…
  lab ssh "$@"
}

other() { case $1 in a) echo b ;; b) echo a ;; esac; }

# Tries a command once a second until it succeeds.
within() { # SECONDS CMD…
  local limit=$1 begin=$SECONDS
  shift
  until "$@"; do
    ((SECONDS - begin < limit)) || die "not within $limit s: $*"
    sleep 1
  done
}

# The small guest that most steps share; whatever host it is on.
have_guest() { # NAME [OPTIONS of lab guest create]
  if lab guest where "$1" >/dev/null 2>&1; then return; fi
  lab guest create "$@"
}

# xl migrate through xenfold. The words of xl and of the agents go to /root/migrate.log on FROM, the figures to
# /root/stats.json.
migrate() { # FROM GUEST [OPTIONS of xenfold-ssh]
  local from=$1 guest=$2
  shift 2
  say "migrate $guest from $from to $(other "$from") $*"
  on "$from" "rm -f /root/stats.json; xl migrate -s 'xenfold-ssh --stats /root/stats.json $*' $guest $(other "$from") >/root/migrate.log 2>&1" || {
    local status=$?
    said "$from"
    return $status
  }
}

# The same in the background, in a process group of its own as a terminal would give it. The link is slow, so that there
# is time to disturb it. must_fail waits for its end.
migration=
start_migration() { # FROM GUEST [OPTIONS]
  local from=$1 guest=$2
  shift 2
  lab rate 20
  on "$from" 'rm -f /root/migrate.log /root/stats.json; touch /root/migrate.log'
  say "migrate $guest from $from to $(other "$from") $*, to be disturbed"
  on "$from" "setsid -w xl migrate -s 'xenfold-ssh --stats /root/stats.json $*' $guest $(other "$from") >/root/migrate.log 2>&1" &
  migration=$!
}

must_fail() {
  if wait "$migration"; then die 'the migration succeeded, which it should not'; fi
  lab rate none
}

said() { on "$1" 'tail -n 40 /root/migrate.log' >&2; }

log_has() { # HOST PATTERN
  on "$1" "grep -q '$2' /root/migrate.log"
}

must_say() { # HOST PATTERN
  log_has "$1" "$2" || {
    said "$1"
    die "xl and xenfold on $1 do not say: $2"
  }
}

# Waits until pages of the guest are on their way.
in_the_stream() { within 90 log_has "$1" ': pass 1,' || { said "$1"; return 1; }; }

agent_has_ended() { ! on "$1" 'pgrep -x xenfold-ssh >/dev/null'; }

# All domains on a host that are or were this guest, with xl's letters for their state.
copies() { # HOST GUEST
  on "$1" xl list | awk -v name="$2" 'index($1, name) == 1 && substr($1, length(name) + 1) ~ /^(--.*)?$/ { print $1, $5 }'
}

# Both hosts hold exactly one copy of the guest: on HOST, under its name, neither paused nor suspended.
is_only_on() { # HOST GUEST
  local here there name state
  here=$(copies "$1" "$2")
  there=$(copies "$(other "$1")" "$2")
  read -r name state <<<"$here" || true
  if [ "$name" = "$2" ] && [[ $here != *$'\n'* && $state != *[psdc]* && -z $there ]]; then return; fi
  say "$2 on $1: '$here', on $(other "$1"): '$there'"
  return 1
}

# It runs there, nowhere else, and its memory is right.
must_be_well_on() { # HOST GUEST
  within 60 is_only_on "$@"
  lab guest check "$2"
}

# What each failure that leaves the guest with its source has to show.
must_have_stayed() { # HOST GUEST
  must_be_well_on "$@"
  say "the same migration again"
  migrate "$@"
  must_be_well_on "$(other "$1")" "$2"
}

# Checks the figures of the last migration from a host: Python expressions over f.
figures() { # HOST EXPRESSION…
  local host=$1
  shift
  on "$host" cat /root/stats.json | python3 -c '
import json, sys
f = json.load(sys.stdin)
shown = {k: f[k] for k in ("time_elapsed_ms", "downtime_ms", "iteration", "stream_bytes", "wire_bytes", "pages", "verify")}
print(json.dumps(shown))
wrong = [e for e in sys.argv[1:] if not eval(e, {"f": f})]
sys.exit("figures are not as they should be: %s\n%s" % (wrong, json.dumps(f, indent=1)) if wrong else 0)' "$@"
}

# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# A long cut of the cable while pages follow a guest that writes to its disk: what its disk waits for is no error for it.

# lab outage SECONDS: a Debian guest under a database goes from a to b, hypervisor `paging`. Needs the programs of `lab push`.
lab_outage() {
  local seconds=${1:-60} guest=outage begin again migration errors
  [[ $seconds =~ ^[1-9][0-9]*$ ]] || die 'usage: lab outage [SECONDS]'
  must_run a
  must_run b
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'outage: needs scripts/lab up --hypervisor paging'
  guest_create $guest --kind debian --on a --memory 384 --check 16 --without compiler --without web --without cache
  guest_load $guest database
  sleep 20
  lab_rate 20
  on a 'rm -f /root/follow.log; touch /root/follow.log' </dev/null
  on a "xl migrate -s 'xenfold-ssh --mode postcopy' $guest b >/root/follow.log 2>&1" </dev/null &
  migration=$!
  until follow_says a ': runs on '; do
    kill -0 $migration 2>/dev/null || { on a 'cat /root/follow.log' </dev/null >&2; die 'outage: the migration failed'; }
    sleep 1
  done
  sleep 10
  say "outage: the cable is out for $seconds s"
  follow_again a 0 &
  again=$!
  lab_link cut
  sleep "$seconds"
  on b "xl list $guest" </dev/null >&2
  lab_link restore
  begin=$(date +%s%3N)
  while kill -0 $again 2>/dev/null; do
    [ $(($(date +%s%3N) - begin)) -lt 300000 ] || { on a 'cat /root/follow.log' </dev/null >&2; die 'outage: not connected again within 300 s'; }
    sleep 0.1
  done
  wait $again || die 'outage: host a cannot be asked'
  say "outage: connected again after $(($(date +%s%3N) - begin)) ms"
  wait $migration || { on a 'tail -n 40 /root/follow.log' </dev/null >&2; die 'outage: the migration failed'; }
  lab_rate none
  on a 'tail -n 3 /root/follow.log' </dev/null >&2
  guest_check $guest 300 >&2 || die "outage: the guest's memory is wrong"
  errors=$(guest_console $guest 2000 | grep -ciE 'I/O error|hung task|remounting filesystem read-only|PANIC' || true)
  [ "$errors" = 0 ] || { guest_console $guest 60 >&2; die "outage: the guest's console tells of $errors errors"; }
  say "outage: no error on the guest's console, memory right"
  guest_destroy $guest
}

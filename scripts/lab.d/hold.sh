# shellcheck shell=bash
# lab hold: migrations of a guest that writes all the time, with pages held back and the dirty bitmap read beside xl.

HOLD_GUEST=hold

# Each migration must go through (a bitmap that is read at the wrong moment ends it), and --verify and the guest's own
# checker must find its memory right.
lab_hold() {
  local count=${1:?usage: lab hold N} round from to status=0
  must_run a
  must_run b
  guest_host $HOLD_GUEST >/dev/null || guest_create $HOLD_GUEST --write 8
  lab_rate 50
  on a 'rm -f /root/hold.json' </dev/null
  on b 'rm -f /root/hold.json' </dev/null
  for ((round = 1; round <= count; round++)); do
    from=$(guest_where $HOLD_GUEST)
    to=$([ "$from" = a ] && echo b || echo a)
    on "$from" "xl migrate -s 'xenfold-ssh --verify --stats /root/stats.json' $HOLD_GUEST $to >/root/hold.log 2>&1" </dev/null || status=$?
    if [ $status != 0 ]; then
      on "$from" 'tail -n 30 /root/hold.log' </dev/null >&2
      die "hold: migration $round failed (status $status)"
    fi
    on "$from" "tr -d '\n' </root/stats.json >>/root/hold.json; echo >>/root/hold.json" </dev/null
    guest_check $HOLD_GUEST 240 >/dev/null || die "hold: the guest's memory is wrong after migration $round"
    say "hold: migration $round: guest on $to, memory right"
  done
  lab_rate none
  { on a 'cat /root/hold.json 2>/dev/null' </dev/null || true; on b 'cat /root/hold.json 2>/dev/null' </dev/null || true; } |
    python3 -c '
import json, sys
runs = [json.loads(line) for line in sys.stdin]
total = lambda key: sum(run["holding"][key] for run in runs)
peeks, busy, pages, held, again = (total(key) for key in ("peeks", "busy_peeks", "pages_from_xl", "held_pages", "again_pages"))
share = total("peek_time_us") / 10 / max(sum(run["time_elapsed_ms"] for run in runs), 1)
print(f"hold: {len(runs)} migrations, all verified: the bitmap was read {peeks} times ({share:.2f} % of the time), {busy} times "
      f"Xen was busy; of {pages} pages from xl {again} were not sent")
verified = all(run["verify"]["equal_pages"] > 0 for run in runs)
sys.exit(0 if len(runs) == int(sys.argv[1]) and verified and peeks and held else "hold: not verified, or nothing was held")' "$count"
}

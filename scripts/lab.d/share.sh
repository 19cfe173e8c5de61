# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# Three small guests of one group on one host, their equal pages shared: how many, whether Xen's counters say the same, and
# whether every guest's memory stays right while they write, after the daemon was killed, and after all was given back. A
# fourth, made of the same and outside the group, has no frame with them.

# lab share: host a, hypervisor `paging`. Needs the programs of `lab push`, and builds the oracle.
lab_share() {
  local seconds=600 memory=192 write=1 json='' work n guests=(share-1 share-2 share-3 outsider) begin target
  while [ $# -gt 0 ]; do
    case $1 in
      --seconds) seconds=${2:-}; shift ;;
      --memory) memory=${2:-}; shift ;;
      --write) write=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      *) die "share: unknown option '$1'" ;;
    esac
    shift
  done
  must_run a
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'share: needs scripts/lab up --hypervisor paging'
  target=${CARGO_TARGET_DIR:-$REPO/target}/release
  cargo build --quiet --locked --release --manifest-path "$REPO/Cargo.toml" -p xenfoldd --example share_oracle
  lab_push "$target/examples/share_oracle"
  work=$(mktemp -d "$STATE/share.XXXXXX")
  # A scan without a bound: a hundredth of this is left where no processor is idle.
  lab_groups 'store_size = 0' 'index_rate = 100000000' 'index_processor = 0' 'sharing = true' 'sharing_reserve = "64MiB"' '[group]' 'lab = ["share-*"]'
  for n in "${guests[@]}"; do
    guest_create "$n" --kind small --on a --memory "$memory" --write "$write"
  done
  begin=$SECONDS
  for n in "${guests[@]}"; do on a "xenfold dedup scan $n" </dev/null >/dev/null; done
  share_settles "$seconds"
  say "nothing more is shared after $((SECONDS - begin)) s"
  share_measure "$work" ''
  for n in "${guests[@]}"; do guest_check "$n" 600 >&2 || die "guest $n is damaged while it shares"; done
  on a 'systemctl kill -s KILL xenfoldd' </dev/null
  sleep 10
  for n in "${guests[@]}"; do share_scan "$n"; done
  share_settles "$seconds"
  share_measure "$work" -again
  on a 'xenfold dedup disable' </dev/null >&2 || die 'not all pages went back to their guests'
  on a 'xenfold dedup status --json' </dev/null >"$work/dedup-off.json"
  for n in "${guests[@]}"; do guest_check "$n" 600 >&2 || die "guest $n is damaged after its pages went back to it"; done
  for n in "${guests[@]}"; do guest_destroy "$n"; done
  python3 - "$work" <<'P' >"$work/result.json" || { cat "$work/result.json"; die 'share: a goal is missed'; }
import json, sys
def read(name): return json.load(open(f"{sys.argv[1]}/{name}.json"))
result, good = {}, True
for when in "", "-again":
    oracle, dedup = read("oracle" + when), read("dedup" + when)
    outsider, all_four = read("outsider" + when), read("all" + when)
    share = 100 * oracle["shared"] / max(oracle["shareable"], 1)
    differ = 100 * abs(dedup["saved_pages"] - dedup["xen_saved_pages"]) / max(dedup["xen_saved_pages"], 1)
    between = all_four["shareable"] - oracle["shareable"] - outsider["shareable"]
    good = good and share >= 97 and differ <= 2 and between > 1000 and oracle["foreign"] == outsider["foreign"] == 0
    result["after_kill" if when else "first"] = {
        **oracle, "outsider": outsider, "kept_apart": between, "share_percent": round(share, 2), "table_saved": dedup["saved_pages"],
        "xen_saved": dedup["xen_saved_pages"], "table_differs_percent": round(differ, 2),
        **{name: dedup[name] for name in ("pages", "frames", "broken", "changed", "refused", "xen_frames")}}
off = read("dedup-off")
result["left_after_disable"] = off["xen_saved_pages"]
good = good and off["xen_saved_pages"] == 0
print(json.dumps(result, indent=1))
sys.exit(not good)
P
  cat "$work/result.json"
  [ -z "$json" ] || cp "$work/result.json" "$json"
  rm -r "$work"
}

# Right after its start the daemon does not know the guests yet.
share_scan() {
  local begin=$SECONDS
  until on a "xenfold dedup scan $1" </dev/null >/dev/null 2>&1; do
    [ $((SECONDS - begin)) -lt 60 ] || die "the daemon on a does not know guest $1: $(on a 'xenfold index' </dev/null)"
    sleep 2
  done
}

# Waits until the table grows by less than a hundredth in a minute.
share_settles() { # SECONDS
  local begin=$SECONDS before=0 now
  while :; do
    sleep 60
    now=$(dedup_figure saved_pages)
    say "$now pages are spared after $((SECONDS - begin)) s"
    [ "$now" -lt 1 ] || [ $((now - before)) -gt $((now / 100)) ] || return 0
    [ $((SECONDS - begin)) -lt "$1" ] || return 0
    before=$now
  done
}

dedup_figure() { on a 'xenfold dedup status --json' </dev/null | sed -n "s/^  \"$1\": \([0-9]*\),*$/\1/p" | head -n 1; }

# All at a moment at which no guest runs.
share_measure() { # WORK SUFFIX
  local n inside=(share-1 share-2 share-3)
  for n in "${inside[@]}" outsider; do on a "xl pause $n" </dev/null; done
  # What was written just before shows in the table when its page has been visited; that takes a round.
  sleep 60
  share_oracle "$1/oracle$2.json" "${inside[@]}"
  share_oracle "$1/outsider$2.json" outsider
  share_oracle "$1/all$2.json" "${inside[@]}" outsider
  on a 'xenfold dedup status --json' </dev/null >"$1/dedup$2.json"
  for n in "${inside[@]}" outsider; do on a "xl unpause $n" </dev/null; done
}

share_oracle() { # FILE GUEST…
  local file=$1
  shift
  on a "share_oracle $*" </dev/null >"$file" || die 'the oracle fails'
}

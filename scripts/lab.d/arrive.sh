# shellcheck shell=bash
# shellcheck disable=SC2153 # scripts/lab sets STATE
# A small guest migrates to where another one of its group runs: how many of the pages that it found there are shared with
# that guest at once, and how long that takes beside a bare loop over the same pages.

# lab arrive: hypervisor `paging`. Needs the programs of `lab push`, and builds the bare loop.
lab_arrive() {
  local memory=192 check=4 json='' work target one=arrive-one two=arrive-two
  while [ $# -gt 0 ]; do
    case $1 in
      --memory) memory=${2:-}; shift ;;
      --check) check=${2:-}; shift ;;
      --json) json=${2:-}; shift ;;
      *) die "arrive: unknown option '$1'" ;;
    esac
    shift
  done
  must_run a
  must_run b
  [ "$(cat "$STATE/hypervisor")" = paging ] || die 'arrive: needs scripts/lab up --hypervisor paging'
  target=${CARGO_TARGET_DIR:-$REPO/target}/release
  cargo build --quiet --locked --release --manifest-path "$REPO/Cargo.toml" -p xenfoldd --example share_bare
  lab_push "$target/examples/share_bare"
  work=$(mktemp -d "$STATE/arrive.XXXXXX")
  lab_groups 'store_size = 0' 'index_rate = 100000000' 'index_processor = 0' 'sharing = true' 'sharing_reserve = "64MiB"' '[group]' 'lab = ["arrive-*"]'
  guest_create $one --kind small --on b --memory "$memory" --check "$check"
  guest_create $two --kind small --on a --memory "$memory" --check "$check"
  indexed b $one
  on a "xl migrate -s 'xenfold-ssh --stats /root/arrive.json' $two b" </dev/null || die 'the migration failed'
  arrive_settles 600
  on a 'cat /root/arrive.json' </dev/null >"$work/figures.json"
  on b 'xenfold dedup status --json' </dev/null >"$work/dedup.json"
  guest_check $one 600 >&2 || die "guest $one is damaged while it shares"
  guest_check $two 600 >&2 || die "guest $two is damaged while it shares"
  # The same pages once more, by hand. Only one process of a host may share.
  on b 'xenfold dedup disable' </dev/null >&2 || die 'not all pages went back to their guests'
  lab_daemon stop
  on b "xl pause $one; xl pause $two" </dev/null
  # It sets them going before it shares.
  on b "share_bare $one $two" </dev/null >"$work/bare.json" || die 'the bare loop fails'
  guest_check $one 600 >&2 || die "guest $one is damaged by the bare loop"
  guest_check $two 600 >&2 || die "guest $two is damaged by the bare loop"
  guest_destroy $one
  guest_destroy $two
  python3 - "$work" <<'P' >"$work/result.json" || { cat "$work/result.json"; die 'arrive: a goal is missed'; }
import json, sys
figures, dedup, bare = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("figures", "dedup", "bare"))
resolved = figures["destination"]["resolved_from_contents"]
# The image has also those pages that refer to one that was resolved.
wanted = max(resolved, dedup["arrived"], 1)
share = 100 * dedup["arrived_shared"] / wanted
bare_ms = bare["ms"] * wanted / max(bare["pairs"], 1)
took = dedup["arrival_ms"]
good = resolved > 0 and took is not None and share >= 97 and took <= 2 * bare_ms
print(json.dumps({
    "resolved": resolved, "arrived": dedup["arrived"], "shared": dedup["arrived_shared"],
    "share_percent": round(share, 2), "waited_ms": dedup["arrival_waited_ms"], "arrival_ms": took, "bare_ms": round(bare_ms),
    "times_bare": None if took is None else round(took / max(bare_ms, 1), 2),
    "bare": bare, "changed": dedup["changed"], "refused": dedup["refused"], "broken": dedup["broken"]}, indent=1))
sys.exit(not good)
P
  cat "$work/result.json"
  [ -z "$json" ] || cp "$work/result.json" "$json"
  rm -r "$work"
}

# Waits until every page on b that is to be shared at once has been.
arrive_settles() { # SECONDS
  local begin=$SECONDS
  until on b 'xenfold dedup status --json' </dev/null | grep -q '"arrival_ms": [0-9]'; do
    [ $((SECONDS - begin)) -lt "$1" ] || die "nothing has been shared on arrival: $(on b 'xenfold dedup status' </dev/null)"
    sleep 1
  done
}

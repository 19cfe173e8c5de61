# shellcheck shell=bash
# Guests of the lab, and what is measured on them.

lab_guest() {
  local command=${1:-}
  [ $# = 0 ] || shift
  case $command in
    create | where | check | console | list | destroy) "guest_$command" "$@" ;;
    *) die "usage: lab guest create|where|check|console|list|destroy …" ;;
  esac
}

lab_capture() { die "not yet"; }
lab_ticks() { die "not yet"; }

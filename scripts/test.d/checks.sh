# shellcheck shell=bash
# Steps that need no Xen.

# Xen's headers are installed here: the committed bindings are for machines where they are not.
export XENFOLD_REQUIRE_BINDGEN=1

check_format() { cargo fmt --all --check; }

check_scripts() {
  local files
  mapfile -t files < <(git ls-files -z --cached --others --exclude-standard |
    xargs -0 awk 'FNR == 1 && (/^#!.*sh/ || /^# shellcheck shell=/) { print FILENAME }')
  echo "${#files[@]} scripts"
  # SC2154: a part of a script does not see what the others assign.
  shellcheck -x -S warning -e SC2154 "${files[@]}"
}

# What is shipped is free of xenctrl (GPL-3.0-only, the oracle of a test), and the library of everything about Xen.
check_shipped() {
  local tree
  tree=$(cargo tree --locked --workspace -e normal,build --prefix none)
  ! grep -E '^xenctrl' <<<"$tree" || die 'xenctrl may only be a dev-dependency'
  tree=$(cargo tree --locked -p xenfold -e normal,build --prefix none)
  ! grep -E '^(xen-sys|libloading|bindgen) ' <<<"$tree" || die 'the library must not depend on these'
  ! git grep -nE '\bunsafe\b *(\{|fn|impl|extern)' -- '*.rs' ':!xen-sys' || die 'unsafe code belongs into xen-sys'
}

check_licences() {
  need_tool cargo-deny 0.20.2
  cargo deny --locked check --hide-inclusion-graph licenses bans sources
}

check_fallback_bindings() { XENFOLD_REQUIRE_BINDGEN='' XENFOLD_NO_BINDGEN=1 cargo check --locked -p xen-sys; }

check_clippy() {
  cargo clippy --version || skip 'clippy is missing (Debian has none for its newer Rust; rustup has)'
  cargo clippy --locked --workspace --all-targets -- -D warnings
}

# Alone, so that nothing that only the others need is built into it.
check_library() {
  need_verify_stream
  export XENFOLD_REQUIRE_ORACLES=1
  cargo test --locked -p xenfold
}

check_workspace() { cargo test --locked --workspace --exclude xenfold; }

# A published program, kept in the cache. Unoptimized: built in a third of the time, and it runs for seconds.
need_tool() {
  local name=$1 version=$2 root=$CACHE/tools/$1-$2
  export PATH=$root/bin:$PATH
  [ ! -x "$root/bin/$name" ] || return 0
  say "building $name $version"
  CARGO_PROFILE_DEV_DEBUG=false CARGO_TARGET_DIR=$root/target cargo install --quiet --locked --profile dev --root "$root" "$name@$version"
  rm -r "$root/target"
}

# Xen's own checker of streams and its Python library, taken out of Debian's package: installed, that would bring Xen's
# daemons with it.
need_verify_stream() {
  local package=xen-utils-4.17 root=$CACHE/tools/verify-stream download
  export XENFOLD_VERIFY_STREAM=$root/usr/lib/xen-4.17/bin/verify-stream-v2
  [ ! -e "$XENFOLD_VERIFY_STREAM" ] || return 0
  say "fetching verify-stream-v2 from Debian's package $package"
  download=$(mktemp -d)
  (cd "$download" && { apt-get -q -o APT::Sandbox::User=root download "$package" ||
    { apt-get -q update && apt-get -q -o APT::Sandbox::User=root download "$package"; }; })
  dpkg-deb -x "$download"/*.deb "$download/root"
  mkdir -p "${root%/*}"
  mv -T "$download/root" "$root"
  rm -r "$download"
}

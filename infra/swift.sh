#!/usr/bin/env bash
# infra/swift.sh install               install Debian's packages (apt-get, as root); no service is started or enabled
# infra/swift.sh start FOLDER [PORT]   start in the background and print the exports for its clients
# infra/swift.sh run FOLDER [PORT]     start, and stop when standard input ends or on an interrupt
# infra/swift.sh stop FOLDER           end the processes and keep the folder
# OpenStack Swift with its S3 API: the tests' second object store besides moto_server. All files of a store
# (configuration, rings, objects, logs, process ids) are in one folder; it listens on free ports of 127.0.0.1 and needs
# no root.
# Exit status 3: Swift cannot run on this machine (not installed, or a file system without extended attributes).
set -euo pipefail
packages=(swift-proxy swift-account swift-container swift-object memcached)
servers=(account container object proxy)
export PATH=$PATH:/usr/sbin:/sbin
unset PYTHONPATH PYTHONHOME # Swift runs on the system's Python

fail() {
    echo "infra/swift.sh: $2" >&2
    exit "$1"
}

installed() {
    command -v memcached >/dev/null || return 1
    for server in "${servers[@]}"; do command -v "swift-$server-server" >/dev/null || return 1; done
}

install() {
    if installed; then
        echo "Swift is installed already" >&2
        return
    fi
    "$(dirname "$0")/packages.sh" "${packages[@]}"
}

start() {
    installed || fail 3 "Swift is not installed; as root: infra/swift.sh install"
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    ! running "$folder"/*.pid || fail 1 "a store runs in $folder already; infra/swift.sh stop $folder"
    mkdir -p "$folder/devices/disk" "$folder/cache"
    /usr/bin/python3 -c 'import os, sys; os.setxattr(sys.argv[1], "user.mome", b"x")' "$folder/devices/disk" 2>/dev/null ||
        fail 3 "Swift keeps metadata in extended attributes, and the file system of $folder has none; use another folder"
    read -r proxy account container object cache < <(free_ports "${2:-0}") || fail 1 "port ${2:-} is taken; name another"
    configure
    launched=yes
    # memcached needs no pid file; the option puts the folder on its command line, where `running` looks for it.
    launch memcached memcached -l 127.0.0.1 -p "$cache" -u "$(id -un)" -m 16 -P "$folder/memcached.own"
    for server in "${servers[@]}"; do
        launch "$server" /usr/bin/python3 -c "$serve" "$folder" "$(command -v "swift-$server-server")" \
            "$folder/$server-server.conf" -v
    done
    await "$proxy" "$account" "$container" "$object" "$cache"
    echo "export AWS_ENDPOINT_URL=http://127.0.0.1:$proxy AWS_ACCESS_KEY_ID=mome:local AWS_SECRET_ACCESS_KEY=local"
}

free_ports() {
    /usr/bin/python3 - "$1" 2>/dev/null <<'PYTHON'
import socket, sys

sockets = [socket.create_server(("127.0.0.1", port)) for port in (int(sys.argv[1]), 0, 0, 0, 0)]
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

configure() {
    for server in account container object; do
        cat >"$folder/$server-server.conf" <<CONF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = ${!server}
devices = $folder/devices
mount_check = false
disable_fallocate = true
$(common)
[pipeline:main]
pipeline = healthcheck $server-server
[app:$server-server]
use = egg:swift#$server
[filter:healthcheck]
use = egg:swift#healthcheck
CONF
    done
    cat >"$folder/proxy-server.conf" <<CONF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $proxy
$(common)
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:$cache
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_mome_local = local .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
CONF
    cat >"$folder/swift.conf" <<CONF
[swift-hash]
swift_hash_path_prefix = mome
swift_hash_path_suffix = local
[storage-policy:0]
name = one-replica
default = yes
CONF
    /usr/bin/python3 - "$folder" account "$account" container "$container" object "$object" <<'PYTHON'
import sys

from swift.common.ring import RingBuilder

folder, *rest = sys.argv[1:]
for name, port in zip(rest[::2], rest[1::2], strict=True):
    ring = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    ring.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk", "weight": 1})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{name}.ring.gz")
PYTHON
}

# workers = 0: one process per server. log_address: a missing socket keeps Swift out of the system log.
common() {
    cat <<CONF
workers = 0
user = $(id -un)
swift_dir = $folder
recon_cache_path = $folder/cache
log_address = $folder/no-syslog
log_level = WARNING
CONF
}

# Swift reads /etc/swift/swift.conf regardless of swift_dir, so the path is set before any other import.
serve='
import runpy, sys
from swift.common import utils
utils.SWIFT_CONF_FILE = sys.argv[1] + "/swift.conf"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
'

launch() {
    local name=$1
    shift
    setsid "$@" </dev/null >"$folder/$name.log" 2>&1 &
    echo $! >"$folder/$name.pid"
}

await() {
    for _ in $(seq 300); do
        sleep 0.1
        if answers "$@"; then return; fi
        for file in "$folder"/*.pid; do
            running "$file" || break 2
        done
    done
    tail -n 5 "$folder"/*.log >&2
    stop "$folder"
    fail 1 "the store did not start; its logs are in $folder"
}

answers() {
    for port in "$@"; do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 1
    done
}

# Return 0 if any of the given pid files names a process of this store. A reboot may assign the ids to other processes.
running() {
    local file
    for file in "$@"; do
        if [ -e "$file" ] && grep -qF "$(dirname "$file")" "/proc/$(cat "$file")/cmdline" 2>/dev/null; then return 0; fi
    done
    return 1
}

stop() {
    local folder signal
    folder=$(cd "$1" && pwd)
    for signal in TERM KILL; do
        for file in "$folder"/*.pid; do
            if running "$file"; then kill -s "$signal" "$(cat "$file")" 2>/dev/null || true; fi
        done
        for _ in $(seq 50); do
            running "$folder"/*.pid || break 2
            sleep 0.1
        done
    done
    rm -f "$folder"/*.pid
}

run() {
    trap 'if [ -n "${launched:-}" ]; then stop "$folder"; fi' EXIT
    trap 'exit 0' INT TERM
    start "$@"
    while read -r _; do :; done
}

case "${1:-} $#" in
"install 1") install ;;
"start 2" | "start 3" | "run 2" | "run 3" | "stop 2") "$@" ;;
*) fail 2 "usage: infra/swift.sh install | start FOLDER [PORT] | run FOLDER [PORT] | stop FOLDER" ;;
esac

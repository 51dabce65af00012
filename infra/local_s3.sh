#!/usr/bin/env bash
# infra/local_s3.sh [PORT] [BUCKET]        then run the printed exports in another shell
# Local S3 store for experiments: moto_server in the foreground, with one bucket. All data is lost when it exits.
set -euo pipefail
port=${1:-5000}
bucket=${2:-mome}
venv=$(dirname "$0")/../.venv/bin
if [ ! -x "$venv/moto_server" ]; then
    echo "$venv/moto_server: not installed. Run 'make .venv/installed' in the checkout first" >&2
    exit 2
fi
bin=$(cd "$venv" && pwd)

"$bin/moto_server" -H 127.0.0.1 -p "$port" >/dev/null 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT

export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local
# Create the bucket only once this server owns the port: another process, with another store, may be listening there.
"$bin/python" - "$bucket" "$server" "$port" <<'PYTHON'
import sys
import time

import boto3
import psutil

bucket, server, port = sys.argv[1], psutil.Process(int(sys.argv[2])), int(sys.argv[3])
for _ in range(120):
    if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
        sys.exit(f"port {port} is taken, or moto_server failed to start: give another one: infra/local_s3.sh PORT BUCKET")
    if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in server.net_connections("tcp")):
        break
    time.sleep(0.5)
else:
    sys.exit(f"moto_server does not listen at port {port} after 60 s")
boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
PYTHON

echo "export AWS_ENDPOINT_URL=$AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local"
echo "s3://$bucket is served until this is interrupted" >&2
wait "$server"

#!/usr/bin/env bash
# A local S3 store for trying things out: moto_server in the foreground, with one bucket. Nothing outlives it.
#   infra/local_s3.sh [PORT] [BUCKET]        then, in another shell, the exports that it prints
set -euo pipefail
port=${1:-5000}
bucket=${2:-mome}
bin=$(cd "$(dirname "$0")/../.venv/bin" && pwd)

"$bin/moto_server" -H 127.0.0.1 -p "$port" >/dev/null 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT

export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local
"$bin/python" - "$bucket" <<'PYTHON'
import sys
import time

import boto3
import botocore.exceptions

store = boto3.client("s3", region_name="us-east-1")
for _ in range(60):
    try:
        store.create_bucket(Bucket=sys.argv[1])
        break
    except botocore.exceptions.EndpointConnectionError:
        time.sleep(0.5)
else:
    sys.exit("the store did not start; is the port taken?")
PYTHON

echo "export AWS_ENDPOINT_URL=$AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local"
echo "s3://$bucket is served until this is interrupted" >&2
wait "$server"

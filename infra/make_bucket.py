"""Makes a bucket where there is none, in the store that the usual AWS variables name: python make_bucket.py BUCKET."""

from __future__ import annotations

import sys

import boto3
from botocore.exceptions import ClientError

THERE_ALREADY = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_bucket(bucket: str) -> None:
    """Raises what botocore raises, except that the bucket exists. Waits for a store that does not answer yet."""
    from botocore.config import Config

    retries = Config(retries={"mode": "standard", "max_attempts": 12}, s3={"addressing_style": "path"})
    try:
        boto3.client("s3", config=retries).create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in THERE_ALREADY:
            raise


if __name__ == "__main__":
    make_bucket(sys.argv[1])

"""Makes buckets of an S3 store unless they exist: python make_buckets.py NAME... (AWS_ENDPOINT_URL_S3 says where)."""

import sys

import boto3
from botocore.config import Config

store = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
present = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
for name in sys.argv[1:]:
    if name in present:
        print(f"bucket {name} exists")
    else:
        store.create_bucket(Bucket=name)
        print(f"bucket {name} made")

"""What a native library needs to reach the store that fsspec reaches. It knows no profiles and roles as botocore does."""

from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync

from pipeline.storage.objects import filesystem


def native_options(url: str) -> dict[str, str] | None:
    """The options of `object_store`, which delta-rs reads and writes with; None where it needs none.

    They hold credentials, so they go nowhere but to such a library.
    """
    if urlsplit(url).scheme not in ("s3", "s3a"):
        return None
    fs, _ = filesystem(url)
    fs.connect()
    client = fs.s3.meta
    region = "us-east-1" if client.region_name in (None, "aws-global") else client.region_name
    options = {"aws_endpoint": client.endpoint_url, "aws_region": region}
    options["aws_allow_http"] = str(client.endpoint_url.startswith("http://")).lower()
    keys = None if fs.anon else sync(fs.loop, _credentials, fs)
    if keys is None:
        return options | {"aws_skip_signature": "true"}
    named = {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key, "aws_session_token": keys.token}
    return options | {name: value for name, value in named.items() if value}


async def _credentials(fs: Any) -> Any:
    """Those of the file system's session, as they are now; None if it has none."""
    found = await fs.session.get_credentials()
    return await found.get_frozen_credentials() if found else None

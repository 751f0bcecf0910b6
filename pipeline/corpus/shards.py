"""Which shards a corpus has."""

from contextlib import suppress
from typing import NamedTuple

from webdataset.shardlists import expand_urls

from pipeline import storage
from pipeline.errors import UserError


class Shard(NamedTuple):
    """One WebDataset tar. Its name is its path below the corpus's common folder, without .tar: unique in a run."""

    name: str
    source: storage.Object


def find(shards: str | list[str], what: str = "corpus.shards") -> list[Shard]:
    """List the shards behind folders, globs and brace patterns, sorted by name.

    Args:
        shards: one or several of: a folder, a pattern such as `s3://b/laion/{00000..00099}.tar` or `data/*.tar`, a tar.
        what: the configuration key to name in an error.

    Raises:
        UserError: nothing there, a compressed tar, or a named shard that does not exist.
    """
    found: dict[str, storage.Object] = {}
    for pattern in [shards] if isinstance(shards, str) else shards:
        try:
            urls = expand_urls(pattern)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
        for items in storage.in_threads(lambda url: _objects(url, what), urls):
            found |= {item.url: item for item in items}
    if not found:
        raise UserError(f"{what}: no .tar shards at {shards}")
    if len({url.partition("://")[0] if "://" in url else "" for url in found}) > 1:
        raise UserError(f"{what}: shards on one kind of storage, please; there are {min(found)} and {max(found)}")
    folders = [folder.split("/") for folder in sorted({url.rpartition("/")[0] for url in found})]
    common = next((i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), min(map(len, folders)))
    names = {url: "/".join(url.split("/")[common:]).removesuffix(".tar") for url in found}
    return [Shard(names[url], found[url]) for url in sorted(found, key=lambda url: names[url])]


def _objects(url: str, what: str) -> list[storage.Object]:
    if url.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{what}: {url} is a compressed tar; decompress it first, shards are read by position")
    try:
        if any(c in url for c in "*?["):
            return [item for item in storage.glob(url) if item.url.endswith(".tar")]
        if url.endswith(".tar"):  # before anything is listed: a bucket may allow to read what it does not allow to list
            with suppress(FileNotFoundError):
                return [storage.describe(url)]
        if storage.is_folder(url):
            return storage.listing(url, ".tar")
        return [storage.describe(url)]
    except FileNotFoundError:
        raise UserError(f"{what}: no shard or folder {url}") from None
    except Exception as error:  # noqa: BLE001  (each store has errors of its own: credentials, names, networks)
        line = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix(f"OSError: {url}: ")
        raise UserError(f"{what}: can't read {url}: {line[:300]}") from None

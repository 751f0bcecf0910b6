"""Find and name the shards of a corpus."""

from contextlib import suppress
from typing import NamedTuple

from webdataset.shardlists import expand_urls

from pipeline import storage
from pipeline.errors import UserError


class Shard(NamedTuple):
    """One WebDataset tar. Its name, its path below the root without .tar, is unique in a run."""

    name: str
    source: storage.Object


def find(shards: str | list[str], what: str = "corpus.shards", root: str | None = None) -> list[Shard]:
    """List the shards behind folders, globs and brace patterns, sorted by name.

    A shard's name is its path below a root. If no root is stated, the root is the fixed part of the pattern that found the
    shard, so a further pattern renames no shard. If a shard of an earlier pattern has the name already, the last part of the
    root is put before it.

    Args:
        shards: one or several of: a folder, a pattern such as `s3://b/laion/{00000..00099}.tar` or `data/*.tar`, a tar.
        what: the configuration key to name in an error.
        root: a folder above all shards.

    Raises:
        UserError: nothing is found, a tar is compressed, a named shard does not exist, or two shards have one name.
    """
    found: dict[str, Shard] = {}  # by URL
    owners: dict[str, str] = {}  # URL by name
    for pattern in [shards] if isinstance(shards, str) else shards:
        try:
            urls = expand_urls(pattern)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
        listed = [item for items in storage.in_threads(lambda url: _objects(url, what), urls) for item in items]
        above = _canonical_root(root) if root else storage.canonical(_fixed_part(pattern))
        for item in listed:
            if item.url in found:
                continue
            if root and not item.url.startswith(f"{above}/"):
                raise UserError(f"corpus.root: {item.url} is not below {root}")
            name = item.url.removeprefix(above).lstrip("/").removesuffix(".tar")
            name = f"{above.rpartition('/')[2]}/{name}" if name in owners else name
            if name in owners:
                raise UserError(f"{what}: {owners[name]} and {item.url} have one name, {name}: state corpus.root")
            found[item.url], owners[name] = Shard(name, item), item.url
    if not found:
        raise UserError(f"{what}: no .tar shards at {shards}")
    if len({url.partition("://")[0] if "://" in url else "" for url in found}) > 1:
        raise UserError(f"{what}: shards on one kind of storage, please; there are {min(found)} and {max(found)}")
    return sorted(found.values(), key=lambda shard: shard.name)


def _fixed_part(pattern: str) -> str:
    """The folder above the first wildcard of a pattern. For a folder it is the folder itself, for a tar the tar's folder."""
    special = min((at for at in map(pattern.find, "*?[{") if at >= 0), default=None)
    if special is None and not pattern.endswith(".tar"):
        return pattern.rstrip("/")
    folder = pattern[:special].rpartition("/")[0]
    return f"{folder}/" if folder.endswith(":/") else folder  # a pattern over buckets: nothing but the scheme is fixed


def _canonical_root(root: str) -> str:
    try:
        return storage.canonical(root)
    except Exception as error:  # noqa: BLE001  (an unknown scheme, or a missing library)
        raise UserError(f"corpus.root: can't read {root}: {' '.join(str(error).split())[:300]}") from None


def _objects(url: str, what: str) -> list[storage.Object]:
    if url.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{what}: {url} is a compressed tar; decompress it first, shards are read by position")
    try:
        if any(c in url for c in "*?["):
            return [item for item in storage.glob(url) if item.url.endswith(".tar")]
        if url.endswith(".tar"):  # no listing: a bucket may allow reading and forbid listing
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

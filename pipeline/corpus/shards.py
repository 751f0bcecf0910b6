"""Find and name the shards of a corpus."""

import glob
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from pipeline import storage
from pipeline.console import say
from pipeline.errors import UserError

FORMS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".z", ".br")
COMPRESSED = (*(f".tar{form}" for form in FORMS), ".tgz", ".tbz2", ".tbz", ".txz", ".tzst")
MANY = 64  # shards named in one folder: from here on it is listed, a request for 1000 of them instead of one for each
NAMED = 5  # missing shards that are named on a line


class Shard(NamedTuple):
    """One WebDataset tar. Its name, its path below the root without .tar, is unique in a run."""

    name: str
    source: storage.Object


def find(shards: str | list[str], what: str = "corpus.shards", root: str | None = None, missing: str = "refuse") -> list[Shard]:
    """List the shards behind folders, globs and brace patterns, sorted by name.

    A path that exists is that path, whatever characters it has: only what does not exist is taken for a pattern. A shard's
    name is its path below a root. If no root is stated, the root is the fixed part of the pattern that found the shard, so a
    further pattern renames no shard. If a shard of an earlier pattern has the name already, the last part of the root is put
    before it.

    Args:
        shards: one or several of: a folder, a pattern such as `s3://b/laion/{00000..00099}.tar` or `data/*.tar`, a tar.
        what: the configuration key to name in an error.
        root: a folder above all shards.
        missing: `skip` leaves out what is named and does not exist, and says so; `refuse` makes it an error.

    Raises:
        UserError: nothing is found, a tar is compressed, a named shard does not exist, or two shards have one name.
    """
    found: dict[str, Shard] = {}  # by URL
    owners: dict[str, str] = {}  # URL by name
    patterns = [part for given in ([shards] if isinstance(shards, str) else shards) for part in given.split("::")]
    for pattern in patterns:
        folder, listed = _find(pattern, what, missing)
        if not listed and len(patterns) > 1:
            say(f"warning: {what}: no .tar shards at {pattern}", logging.WARNING)
        above = _canonical_root(root) if root else storage.canonical(folder)
        for item in listed:
            if item.url in found:
                continue
            if root and not item.url.startswith(f"{above}/"):
                raise UserError(f"corpus.root: {item.url} is not below {root}")
            place = above.rpartition("/")[0] if item.url == above else above  # a file is below its folder
            name = stem(item.url.removeprefix(place).lstrip("/"))
            name = f"{place.rpartition('/')[2]}/{name}" if name in owners else name
            if name in owners:
                raise UserError(f"{what}: {owners[name]} and {item.url} have one name, {name}: state corpus.root")
            found[item.url], owners[name] = Shard(name, item), item.url
    if not found:
        raise UserError(f"{what}: no .tar shards at {shards}")
    if len({url.partition("://")[0] if "://" in url else "" for url in found}) > 1:
        raise UserError(f"{what}: shards on one kind of storage, please; there are {min(found)} and {max(found)}")
    return sorted(found.values(), key=lambda shard: shard.name)


def _find(pattern: str, what: str, missing: str) -> tuple[str, list[storage.Object]]:
    """The fixed part of a pattern, and the shards that it stands for."""
    end = _fixed_part(pattern)
    urls = [pattern]
    if end < len(pattern):
        from webdataset.shardlists import expand_urls  # imports torch, which readers of shards are spared

        try:  # braces are expanded as trainers do it, for whom a backslash escapes the next character
            urls = [pattern[:end] + rest for rest in expand_urls(pattern[end:].replace("\\", "\\\\"))]
        except (ValueError, AssertionError) as error:  # the second where ${NAME} is no variable
            raise UserError(f"{what}: {error}") from None
    listed = _listed(urls)
    found = list(storage.in_threads(lambda url: [listed[url]] if url in listed else _objects(url, what), urls))
    gaps = [url for url, of_url in zip(urls, found, strict=True) if of_url is None]
    if gaps:
        shown = ", ".join(gaps[:NAMED]) + (", ..." if len(gaps) > NAMED else "")
        line = f"{what}: no shard or folder {shown}" + (f" ({len(gaps)} of {len(urls)})" if len(urls) > 1 else "")
        if missing != "skip":
            raise UserError(f"{line}; {what.removesuffix('shards')}missing: skip leaves out what is not there")
        say(f"{line}: left out")
    items = [item for of_url in found for item in of_url or []]
    _refuse_compressed([item.url for item in items], what)
    return pattern[:end], items


def _listed(urls: list[str]) -> dict[str, storage.Object]:
    """Shards among some URLs, of folders in which many are named. Others, and what can't be listed, are asked for by name."""
    of_folder: dict[str, list[str]] = {}
    for url in urls:
        if _is_tar(url):
            of_folder.setdefault(url.rpartition("/")[0], []).append(url)
    found: dict[str, storage.Object] = {}
    for folder, named in of_folder.items():
        if len(named) >= MANY and folder:
            with suppress(Exception):  # a bucket may allow reading and forbid listing
                there = {item.url.rpartition("/")[2]: item for item in storage.children(folder)}
                names = ((url, url.rpartition("/")[2]) for url in named)
                found |= {url: there[name] for url, name in names if name in there}
    return found


def _fixed_part(pattern: str) -> int:
    """Where a pattern begins in what is given: behind the folder in which the first name with a wildcard does not exist.

    All of it is fixed if it exists, or has no wildcard.
    """
    end = 0
    while (special := min((at for c in "*?[{" if (at := pattern.find(c, end)) >= 0), default=-1)) >= 0:
        end = pattern.find("/", special)
        if not _exists(pattern if end < 0 else pattern[:end]):
            return pattern.rfind("/", 0, special) + 1
        if end < 0:
            break
    return len(pattern)


def _exists(url: str) -> bool:
    try:
        fs, path = storage.filesystem(url)
        return bool(fs.exists(path))
    except Exception:  # noqa: BLE001  (it may be no name at all, as of a bucket; what can't be read is said when it is read)
        return False


def _canonical_root(root: str) -> str:
    try:
        return storage.canonical(root)
    except Exception as error:  # noqa: BLE001  (an unknown scheme, or a missing library)
        raise UserError(f"corpus.root: can't read {root}: {' '.join(str(error).split())[:300]}") from None


def _objects(url: str, what: str) -> list[storage.Object] | None:
    """The shards at a place, compressed ones too; None if there is nothing."""
    _refuse_compressed([url], what)
    try:
        end = _fixed_part(url)
        if end < len(url):
            return _shards(storage.glob(glob.escape(url[:end]) + url[end:]))
        if _is_tar(url):  # no listing: a bucket may allow reading and forbid listing
            with suppress(FileNotFoundError):
                return [storage.describe(url)]
        if storage.is_folder(url):
            return _shards(storage.listing(url, ""))
        return [storage.describe(url)]
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  (each store has errors of its own: credentials, names, networks)
        line = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix(f"OSError: {url}: ")
        raise UserError(f"{what}: can't read {url}: {line[:300]}") from None


def _shards(items: Iterable[storage.Object]) -> list[storage.Object]:
    """The tars among some objects. What macOS leaves beside a file, ._00000.tar, is none."""
    named = ((item, item.url.rpartition("/")[2]) for item in items)
    return [item for item, name in named if (_is_tar(name) or _is_compressed(name)) and not name.startswith("._")]


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def stem(url: str) -> str:
    """A name without .tar, in any case."""
    return url[: -len(".tar")] if _is_tar(url) else url


def _refuse_compressed(urls: list[str], what: str) -> None:
    """Raise UserError if tars are compressed: members are read by their position, and no shard is left out in silence."""
    compressed = [url for url in urls if _is_compressed(url)]
    if compressed and len(urls) == 1:
        raise UserError(f"{what}: {urls[0]} is a compressed tar; decompress it first, shards are read by position")
    if compressed:
        others = " (a pattern *.tar names the others alone)" if len(compressed) < len(urls) else ""
        raise UserError(
            f"{what}: {len(compressed)} of {len(urls)} tars are compressed, such as {compressed[0]}; decompress them first, "
            f"shards are read by position{others}"
        )

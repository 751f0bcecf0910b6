"""Read a tar strictly. Every member is counted, and a tar that breaks off is reported, never taken for a shorter one."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

BLOCK = 512
MAX_HEADER = 16 << 20  # bytes of an extension header: a long name, the records of a PAX header
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
MEMBER_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")  # the key is the path up to the first dot of the file name


@dataclass
class Group:
    """The members that share a key, in the order of the tar."""

    index: int  # position of the pair in its shard, from 0
    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by lower-case suffix
    count: int = 0  # members with this key; more than `members` if a suffix is repeated
    repeated: bool = False  # the key was in the tar before, or a suffix is twice in the group


@dataclass
class Contents:
    """Counts of a tar. `broken` says why reading stopped before a proper end; it is None if the end was reached."""

    members: int = 0
    ignored: int = 0  # directories, links, devices, sparse files, and files without a suffix
    broken: str | None = None


def read_groups(file: BinaryIO, contents: Contents) -> Iterator[Group]:
    """Yield the members of a tar, grouped by key. Every member is counted in `contents`, which also says if the tar broke off.

    The group at which a tar breaks off is yielded too. The caller has to refuse it.
    """
    group: Group | None = None
    keys: set[str] = set()
    count = 0
    for member in _members(file, contents):
        contents.members += 1
        match = MEMBER_NAME.match(member.name)
        if not match or not member.isreg() or member.issparse():  # a tar holds not all bytes of a sparse file
            contents.ignored += 1
            continue
        key, suffix = match[1], match[2].lower()
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(count, key, repeated=key in keys)
            keys.add(key)
            count += 1
        group.count += 1
        group.repeated |= suffix in group.members
        group.members[suffix] = member
    if group is not None:
        yield group


def read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member.

    Raises:
        EOFError: the file ends before the member does.
    """
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise EOFError(f"{member.name}: {len(data)} bytes of {member.size}")
    return data


def _members(file: BinaryIO, contents: Contents) -> Iterator[tarfile.TarInfo]:
    """Yield the headers in order. tarfile ends silently at a damaged header, so the end is checked here."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as tar:  # not the locale's: keys are identities
            while (member := tar.next()) is not None:
                if member.size < 0:  # tarfile would go back by it, in an endless loop
                    contents.broken = "a member of negative size"
                    return
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
                after = tar.offset
                yield member
                if after > size:  # beyond the end of the file
                    contents.broken = "unexpected end of data"
                    return
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, RecursionError) as error:
        contents.broken = _compression(file) or str(error) or type(error).__name__
        return
    file.seek(end)
    if file.read(2 * BLOCK) != bytes(2 * BLOCK):
        contents.broken = "the tar does not end in two zero blocks"
        return
    while rest := file.read(1 << 20):  # zeros in mid-file look like an end, and so does the end of the first of two tars
        if any(rest):
            contents.broken = "the tar goes on after its end"
            return


class _Headers:
    """The file as tarfile sees it. tarfile reads only headers from it, so a large read is refused."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"an extension header of {size} bytes")
        return self._read(size)


def _compression(file: BinaryIO) -> str | None:
    """What to say about a compressed tar that has the name of a plain one; None if the file is not compressed."""
    file.seek(0)
    start = file.read(max(map(len, COMPRESSED)))
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    return f"compressed with {kind}: decompress it, shards are read by position" if kind else None

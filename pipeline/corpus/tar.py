"""Read a tar strictly. Every member is counted, and a tar that breaks off is reported, never taken for a shorter one."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple, Self

BLOCK = 512
MAX_HEADER = 16 << 20  # bytes of an extension header: a long name, the records of a PAX header
WINDOW = 300_000  # members of which one key's are put together wherever they are; their index takes some 150 MB
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json", "cls")
# The key is the path up to a dot of the file name. A file name that begins with a dot has none: `.DS_Store`, `._0001.jpg`.
MEMBER_NAME = {
    "first_dot": re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$"),
    "last_dot": re.compile(r"^((?:.*/|)[^./][^/]*)\.([^./]*)$"),
}


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # of its header
    offset_data: int
    size: int  # bytes


@dataclass
class Group:
    """The members that share a key, in the order of the tar."""

    index: int  # position of the pair in its shard, from 0
    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by lower-case suffix
    count: int = 0  # members with this key; more than `members` if a suffix is repeated
    repeated: bool = False  # the key was in the tar before, or a suffix is twice in the group
    broken: str | None = None  # why the tar broke off within this group or behind it
    caption: int = 0  # the number of its caption, where each caption of a group is a pair

    @property
    def start(self) -> int:
        """Offset of the first member in the tar."""
        return min(member.offset for member in self.members.values())

    @property
    def pair_key(self) -> str:
        """The key, and behind a dot the number of the caption; the first caption has none."""
        return f"{self.key}.{self.caption}" if self.caption else self.key

    def with_caption(self, index: int, caption: int) -> Self:
        """The pair of one of the captions. The members count once, with the first."""
        return replace(self, index=index, caption=caption, count=0 if caption else self.count)


@dataclass
class Contents:
    """Counts of a tar. `broken` says why reading stopped before a proper end; it is None if the end was reached."""

    members: int = 0
    ignored: int = 0  # directories, links, devices, sparse files, and files without a suffix
    broken: str | None = None
    strays: int = 0  # files among the ignored, without what macOS leaves beside a file (._0001.jpg)
    stray: str = ""  # the first of these
    scattered: int = 0  # members that are not next to others of their key
    apart: int = 0  # of keys that were there more than WINDOW members before
    swallowed: int = 0  # members of pairs that the first dot puts under another key
    swallowed_key: str = ""  # the first such pair, by its key up to the last dot


def read_groups(file: BinaryIO, contents: Contents, key_rule: str = "first_dot") -> Iterator[Group]:
    """Yield the members of a tar, grouped by key. Every member is counted in `contents`, which also says if the tar broke off.

    Members of a key need not follow each other: headers are read WINDOW members ahead. What comes later under the key of a
    group with that suffix, or under a key of an earlier window, is a repetition. The group at which a tar breaks off is yielded
    too. The caller has to refuse it.

    Args:
        file: the tar.
        contents: takes the counts.
        key_rule: a key of MEMBER_NAME.
    """
    group: Group | None = None
    waiting: list[Group] = []
    of_key: dict[str, Group] = {}  # the newest of those
    keys: set[str] = set()  # of every group so far
    count = held = 0
    for header in _members(file, contents):
        contents.members += 1
        match = MEMBER_NAME[key_rule].match(header.name)
        if not match or not header.isreg() or header.issparse():  # a tar holds not all bytes of a sparse file
            contents.ignored += 1
            if header.isreg() and not header.name.rpartition("/")[2].startswith("._"):
                contents.strays += 1
                contents.stray = contents.stray or header.name
            continue
        key, suffix = match[1], match[2].lower()
        if group is None or group.key != key:
            before = of_key.get(key)
            if before is not None and suffix not in before.members:
                group = before
                contents.scattered += 1
            else:
                contents.apart += before is None and key in keys
                group = of_key[key] = Group(count, key, repeated=key in keys)
                waiting.append(group)
                keys.add(key)
                count += 1
        group.count += 1
        group.repeated |= suffix in group.members
        group.members[suffix] = Member(header.name, header.offset, header.offset_data, header.size)
        held += 1
        if held >= WINDOW and group is waiting[-1]:
            yield from (_closed(done, contents) for done in waiting[:-1])
            waiting, of_key, held = [group], {key: group}, group.count
    if group is not None:
        group.broken = contents.broken
    yield from (_closed(done, contents) for done in waiting)


def _closed(group: Group, contents: Contents) -> Group:
    """A group whose members are all known. Counts the pairs that its key swallowed."""
    of_stem: dict[str, set[str]] = {}
    for suffix in group.members:
        stem, dot, last = suffix.rpartition(".")
        if dot:
            of_stem.setdefault(stem, set()).add(last)
    for stem, suffixes in of_stem.items():
        if not suffixes.isdisjoint(IMAGE_SUFFIXES) and not suffixes.isdisjoint(TEXT_SUFFIXES):
            contents.swallowed += len(suffixes)
            contents.swallowed_key = contents.swallowed_key or f"{group.key}.{stem}"
    return group


def read_member(file: BinaryIO, member: Member) -> bytes:
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
    except RecursionError:  # its text depends on where it happened
        contents.broken = "extension headers of extension headers, without end"
        return
    except (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError) as error:
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

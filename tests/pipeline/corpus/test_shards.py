"""Which shards a corpus has, and what each is called."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus import shards
from pipeline.corpus.shards import find
from pipeline.corpus.sidecar import successes
from pipeline.errors import UserError
from tests.support.tars import pair, tar_bytes, write_tar


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two folders with shards of the same stem, gaps in the numbering, and what img2dataset leaves beside them."""
    for name in ("a/00000", "a/00002", "a/00010", "b/00000", "b/more/00001"):
        write_tar(tmp_path / f"{name}.tar", pair("0"))
        for beside in (".parquet", "_stats.json", ".tar.tmp"):
            (tmp_path / f"{name}{beside}").write_bytes(b"beside")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{}/a", ["00000", "00002", "00010"]),
        ("{}/a/", ["00000", "00002", "00010"]),
        ("{}/a/*.tar", ["00000", "00002", "00010"]),
        ("{}/a/000?0.tar", ["00000", "00010"]),
        ("{}/a/0000[12].tar", ["00002"]),
        ("{}/a/{{00000,00010}}.tar", ["00000", "00010"]),
        ("{}/a/000{{10..10}}.tar", ["00010"]),
        ("{}/a/00002.tar", ["00002"]),
        ("file://{}/a", ["00000", "00002", "00010"]),
        ("{}", ["a/00000", "a/00002", "a/00010", "b/00000", "b/more/00001"]),
        ("{}/b", ["00000", "more/00001"]),
        ("{}/{{a,b}}/*.tar", ["a/00000", "a/00002", "a/00010", "b/00000"]),
        ("{}/**/00000.tar", ["a/00000", "b/00000"]),
    ],
)
def test_folders_globs_and_braces_give_the_shards_by_name(corpus, pattern, names):
    shards = find(pattern.format(corpus))
    assert [shard.name for shard in shards] == names
    for shard in shards:
        assert shard.source == storage.describe(shard.source.url)
        assert shard.source.size == Path(shard.source.url).stat().st_size


def places(corpus: Path, patterns: list[str], **how) -> dict[str, str]:
    """By name, the path of each shard below the corpus."""
    found = find([f"{corpus}/{pattern}" for pattern in patterns], **how)
    return {shard.name: shard.source.url.removeprefix(f"{corpus}/") for shard in found}


def test_a_list_is_a_union_in_which_no_shard_is_twice(corpus):
    found = places(corpus, ["b/00000.tar", "a/*.tar", "a", "a/00000.tar"])
    assert sorted(found.values()) == ["a/00000.tar", "a/00002.tar", "a/00010.tar", "b/00000.tar"]


def test_a_folder_of_several_without_shards_is_said(corpus, capsys):
    """As where a disk was not mounted."""
    (corpus / "empty").mkdir()
    assert len(find([f"{corpus}/a", f"{corpus}/empty"])) == 3
    assert capsys.readouterr().err == f"warning: corpus.shards: no .tar shards at {corpus}/empty\n"


@pytest.mark.parametrize("first", ["a", "a/*.tar", "a/{{00000,00002}}.tar", "b/**/*.tar", "b/00000.tar"])
@pytest.mark.parametrize("second", ["a", "b", "b/more", "b/more/00001.tar", "elsewhere"])
def test_a_second_folder_renames_nothing(corpus, first, second):
    """The corpus would be embedded again, and uids that are made from names would change."""
    write_tar(corpus / "elsewhere" / "00002.tar", pair("0"))
    first = first.replace("{{", "{").replace("}}", "}")
    before = places(corpus, [first])
    after = places(corpus, [first, second])
    assert before.items() <= after.items()
    assert set(after.values()) == set(before.values()) | set(places(corpus, [second]).values())


def test_a_name_that_is_taken_gets_the_name_of_its_folder_before_it(corpus):
    assert places(corpus, ["a", "b"]) == {
        "00000": "a/00000.tar",
        "00002": "a/00002.tar",
        "00010": "a/00010.tar",
        "b/00000": "b/00000.tar",
        "more/00001": "b/more/00001.tar",
    }


def test_names_that_can_not_be_told_apart_ask_for_a_root(corpus):
    for name in ("one/part", "two/part", "three/part"):
        write_tar(corpus / name / "00000.tar", pair("0"))
    patterns = ["one/part", "two/part", "three/part"]
    with pytest.raises(
        UserError, match=r"corpus\.shards: .*two/part/00000\.tar and .*three/part/00000\.tar .*state corpus\.root"
    ):
        places(corpus, patterns)
    found = places(corpus, patterns, root=str(corpus))
    assert found == {f"{name}/part/00000": f"{name}/part/00000.tar" for name in ("one", "two", "three")}


@pytest.mark.parametrize("root", ["{}", "{}/", "file://{}"])
def test_below_a_stated_root_a_name_is_the_whole_path(corpus, root):
    found = places(corpus, ["b", "a/*.tar"], root=root.format(corpus))
    assert found == {name.removesuffix(".tar"): name for name in found.values()}
    assert list(found) == ["a/00000", "a/00002", "a/00010", "b/00000", "b/more/00001"]


@pytest.mark.parametrize("root", ["a", "b/more", "b/mor"])
def test_a_shard_that_is_not_below_the_root_is_an_error(corpus, root):
    with pytest.raises(UserError, match=rf"corpus\.root: .*b/00000\.tar is not below .*/{root}"):
        places(corpus, ["b"], root=f"{corpus}/{root}")


def test_a_root_on_no_known_storage_is_said(corpus):
    with pytest.raises(UserError, match=r"corpus\.root: can't read nowhere://folder: Protocol not known"):
        find(f"{corpus}/a", root="nowhere://folder")


@pytest.mark.parametrize("pattern", ["memory://{ecif-one,ecif-two}/a/*.tar", "memory://ecif-{one,two}/a/00000.tar"])
def test_a_pattern_over_buckets_names_the_bucket(pattern):
    for bucket in ("ecif-one", "ecif-two"):
        storage.write_bytes(f"memory://{bucket}/a/00000.tar", b"")
    assert [shard.name for shard in find(pattern)] == ["ecif-one/a/00000", "ecif-two/a/00000"]


def test_the_corpus_moved_as_a_whole_keeps_its_names(corpus, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "deeper"
    (corpus / "b").rename(moved)
    assert [shard.name for shard in find(str(moved))] == ["00000", "more/00001"]


def test_a_shard_that_is_named_needs_no_listing(corpus, monkeypatch):
    def forbidden(url):
        raise PermissionError("no ListBucket here")

    monkeypatch.setattr(storage, "is_folder", forbidden)
    assert [s.name for s in find(f"{corpus}/a/{{00000,00010}}.tar")] == ["00000", "00010"]
    with pytest.raises(UserError, match="no ListBucket here"):
        find(f"{corpus}/a")


def test_shards_on_two_kinds_of_storage_are_refused(corpus):
    storage.write_bytes("memory://ecif-shards/00000.tar", b"")
    with pytest.raises(UserError, match=r"corpus.shards: shards on one kind of storage.*memory://"):
        find([f"{corpus}/a", "memory://ecif-shards"])


def test_links_are_followed_to_the_shards(corpus):
    (corpus / "links").mkdir()
    for name in ("00000.tar", "00002.tar"):
        (corpus / "links" / name).symlink_to(corpus / "a" / name)
    for pattern in ("links", "links/*.tar", "links/{{00000,00002}}.tar"):
        before = find(f"{corpus}/{pattern}".replace("{{", "{").replace("}}", "}"))
        assert [(s.name, s.source.size) for s in before] == [(s.name, s.source.size) for s in find(f"{corpus}/a")[:2]]
        write_tar(corpus / "a" / "00000.tar", pair("0", caption=f"the same for {pattern}"))
        after = find(f"{corpus}/{pattern}".replace("{{", "{").replace("}}", "}"))
        assert [x == y for x, y in zip(before, after, strict=True)] == [False, True]


NAMES = [
    "set [v2]",
    "[ab]",
    "a*b",
    "a?b",
    "{0..1}",
    "{x",
    "back\\slash",
    "a#b",
    "a+b=c",
    "50%",
    "a%20b",
    "$HOME",
    "ä ö",
    "[!x]",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_path_that_exists_is_that_path(tmp_path, request, store, name):
    if store == "s3" and "\\" in name:
        pytest.skip("this server takes a backslash for a slash")
    base = str(tmp_path) if store == "local" else f"s3://{request.getfixturevalue('s3')}/names"
    for shard in ("00000", "00001"):
        storage.write_bytes(f"{base}/{name}/{shard}.tar", tar_bytes(pair("0")))
    storage.write_bytes(f"{base}/other/00000.tar", tar_bytes(pair("0")))  # which no such name is a pattern for
    for pattern, names in {
        f"{base}/{name}": ["00000", "00001"],
        f"{base}/{name}/": ["00000", "00001"],
        f"{base}/{name}/00001.tar": ["00001"],
        f"{base}/{name}/*1.tar": ["00001"],
        f"{base}/{name}/0000[01].tar": ["00000", "00001"],
        f"{base}/{name}/{{00000..00001}}.tar": ["00000", "00001"],
    }.items():
        found = find(pattern)
        assert [shard.name for shard in found] == names, pattern
        assert [shard.source.url for shard in found] == [f"{base}/{name}/{shard}.tar" for shard in names]


def test_a_tar_that_has_the_name_of_a_pattern_is_that_tar(corpus):
    for name in ("{00000,00002}", "0000?", "[0]"):
        write_tar(corpus / "a" / f"{name}.tar", pair("0"))
        assert places(corpus, [f"a/{name}.tar"]) == {name: f"a/{name}.tar"}


def test_a_file_without_a_suffix_is_a_shard_when_it_is_named(corpus):
    write_tar(corpus / "a" / "part", pair("0"))
    assert places(corpus, ["a/part"]) == {"part": "a/part"}


def test_suffixes_in_capitals_are_shards_and_what_macos_leaves_beside_them_is_none(corpus):
    write_tar(corpus / "b" / "00007.TAR", pair("0"))
    (corpus / "b" / "._00000.tar").write_bytes(b"resource fork")
    assert list(places(corpus, ["b"])) == ["00000", "00007", "more/00001"]
    (corpus / "b" / "00007_stats.json").write_text('{"successes": 7}')
    assert successes(find(f"{corpus}/b/00007.TAR")[0].source) == (7, "")
    assert list(places(corpus, ["b/*"])) == ["00000", "00007"]


@pytest.mark.parametrize("store", ["local", "s3"])
def test_gaps_of_a_brace_pattern_are_said_or_left_out(corpus, request, capsys, store):
    base = f"{corpus}/a"
    if store == "s3":
        base = f"s3://{request.getfixturevalue('s3')}/gaps"
        for name in ("00000", "00002", "00010"):
            storage.write_bytes(f"{base}/{name}.tar", tar_bytes(pair("0")))
    gaps = ", ".join(f"{base}/0000{i}.tar" for i in (1, 3, 4, 5, 6))
    with pytest.raises(UserError) as caught:
        find(f"{base}/{{00000..00010}}.tar", "targets.clean.shards")
    asked = "targets.clean.missing: skip leaves out what is not there"
    assert str(caught.value) == f"targets.clean.shards: no shard or folder {gaps}, ... (8 of 11); {asked}"
    found = find(f"{base}/{{00000..00010}}.tar", missing="skip")
    assert [shard.name for shard in found] == ["00000", "00002", "00010"]
    assert f"corpus.shards: no shard or folder {gaps}, ... (8 of 11): left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no \.tar shards at"):
        find(f"{base}/{{00003..00005}}.tar", missing="skip")


@pytest.mark.parametrize("store", ["local", "s3"])
def test_many_named_shards_are_listed_and_not_asked_for_one_by_one(corpus, request, capsys, monkeypatch, store):
    """They are what they are when each is asked for; only those that are not there, or can't be listed, are."""
    named = f"{corpus}/a/{{00000..00099}}.tar"
    if store == "s3":
        named = f"s3://{request.getfixturevalue('s3')}/{corpus.name}/{{00000..00099}}.tar"
        for path in (corpus / "a").iterdir():
            storage.write_bytes(f"{named.partition('{')[0]}{path.name}", path.read_bytes())
    asked, describe = [], storage.describe
    monkeypatch.setattr(storage, "describe", lambda url: asked.append(url) or describe(url))
    found = {}
    for many in (1000, 64):
        monkeypatch.setattr(shards, "MANY", many)
        found[many], said = find(named, missing="skip"), capsys.readouterr().err
        assert "(97 of 100): left out" in said
        with pytest.raises(UserError, match="97 of 100"):
            find(named)
    assert found[64] == found[1000]
    assert [shard.name for shard in found[64]] == ["00000", "00002", "00010"]
    assert Counter(url.rpartition("/")[2] for url in asked)["00002.tar"] == 2, "of the two times that nothing was listed"
    monkeypatch.setattr(storage, "children", None)  # as where listing is forbidden
    assert find(named, missing="skip") == found[64]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".TAR.BZ2", ".tar.xz"])
def test_compressed_tars_are_refused_wherever_they_are(corpus, suffix):
    (corpus / "a" / f"00003{suffix}").write_bytes(b"compressed")
    (corpus / "only").mkdir()
    (corpus / "only" / f"00000{suffix}").write_bytes(b"compressed")
    for pattern, said in {
        "a": "1 of 4 tars are compressed, such as",
        "a/*": "1 of 4 tars are compressed, such as",
        "only": "is a compressed tar; decompress it first",
        "only/*": "is a compressed tar; decompress it first",
        f"a/00003{suffix}": "is a compressed tar; decompress it first",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            places(corpus, [pattern])
        assert suffix in str(caught.value)
    assert list(places(corpus, ["a/*.tar"])) == ["00000", "00002", "00010"]  # who names the others does not mean it


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{}/none", "no shard or folder {}/none"),
        ("{}/a/{{00000..00002}}.tar", "no shard or folder {}/a/00001.tar"),
        ("{}/a/*.zip", "no .tar shards at {}/a/*.zip"),
        ("{}/empty", "no .tar shards at {}/empty"),
        ("{}/a/00000.tar.gz", "compressed tar; decompress it first"),
        ("{}/a/*.tgz", "compressed tar; decompress it first"),
        ("{}/a/{{0..3.tar", "Unbalanced braces"),
        ("nowhere://{}/a", "Protocol not known"),
    ],
)
def test_shards_that_are_not_there_are_one_line_that_names_the_key(corpus, pattern, says):
    (corpus / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find(pattern.format(corpus), "targets.clean.shards")
    assert str(caught.value).startswith("targets.clean.shards: ")
    assert says.format(corpus) in str(caught.value)
    assert "\n" not in str(caught.value)

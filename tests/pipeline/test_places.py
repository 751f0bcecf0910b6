"""Places: `~` is the home, a relative path is relative to what it was written in, and URLs stay what they are."""

import pytest

from pipeline.places import absolute, at_home, folder_of


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("place", "folder", "found"),
    [
        ("~", "", "/home/her"),
        ("~/run", "/etc/ecif", "/home/her/run"),
        ("~/run", "s3://b/configs", "/home/her/run"),
        ("local-dir:~/model", "/etc/ecif", "local-dir:/home/her/model"),
        ("run", "", "{here}/run"),
        ("./~", "", "{here}/~"),
        ("a~b/~", "", "{here}/a~b/~"),
        ("../run", "/etc/ecif", "/etc/run"),
        ("shards/{0..3}.tar", "/etc/ecif", "/etc/ecif/shards/{0..3}.tar"),
        ("local-dir:model", "/etc/ecif", "local-dir:/etc/ecif/model"),
        ("/data/x", "s3://b/configs", "/data/x"),
        ("local-dir:/model", "s3://b/configs", "local-dir:/model"),
        ("../shards/*.tar", "s3://b/configs", "s3://b/shards/*.tar"),
        ("s3://c/x", "s3://b/configs", "s3://c/x"),
        ("s3://c/x", "/etc/ecif", "s3://c/x"),
        ("s3://c/~/../x", "", "s3://c/~/../x"),
    ],
)
def test_a_place_is_absolute(tmp_path, place, folder, found):
    assert absolute(place, folder) == found.replace("{here}", str(tmp_path))
    assert absolute(absolute(place, folder)) == absolute(place, folder)


def test_a_home_that_nobody_has_and_a_model_at_a_url_are_refused():
    with pytest.raises(ValueError, match=r"no home folder is known for ~nobody-here/run: .* \./~nobody-here/run"):
        at_home("~nobody-here/run")
    with pytest.raises(ValueError, match="a model's folder is on local disk"):
        absolute("local-dir:model", "s3://b/configs")


def test_without_the_variable_home_the_users_home_counts(monkeypatch):
    monkeypatch.delenv("HOME")
    assert at_home("~/run").endswith("/run")
    assert not at_home("~/run").startswith("~")


def test_the_folder_of_a_file(tmp_path):
    assert folder_of("configs/a.yaml") == f"{tmp_path}/configs"
    assert folder_of("s3://b/configs/a.yaml") == "s3://b/configs"
    assert folder_of("/dev/stdin") == folder_of("/dev/fd/63") == str(tmp_path)

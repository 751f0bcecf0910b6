"""Ray has a token where the home can't hold one, and leaves homes alone that can."""

import os

import pytest

from pipeline.workers.token import OWN, provide_token


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    monkeypatch.setattr(
        os, "environ", {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH_TOKEN")}
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Makes some places read-only or unreadable: permissions do not bind root."""

    def refuse(*places):
        monkeypatch.setitem(os.environ, "HOME", str(tmp_path / "home"))
        monkeypatch.setattr(os, "access", lambda place, mode: str(place) not in {str(tmp_path / p) for p in places})
        return tmp_path / "home"

    return refuse


def test_a_home_that_can_be_written_is_left_to_ray(home):
    home().mkdir()
    provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(("there", "refused"), [("home", "home"), ("", "."), ("home/.ray", "home/.ray")])
def test_a_home_that_is_missing_or_read_only(home, tmp_path, there, refused):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    home(refused)
    provide_token()
    assert os.environ["RAY_AUTH_TOKEN"] == OWN


@pytest.mark.parametrize("refused", [[], ["home/.ray/auth_token"]])
def test_a_token_that_is_there_is_used_if_it_can_be_read(home, refused):
    file = home(*refused) / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.touch()
    provide_token()
    assert ("RAY_AUTH_TOKEN" in os.environ) == bool(refused)


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda place: place)
    provide_token()
    assert os.environ["RAY_AUTH_TOKEN"] == OWN


def test_what_the_user_has_set_stays(home, monkeypatch):
    home("home").mkdir()
    monkeypatch.setitem(os.environ, "RAY_AUTH_TOKEN_PATH", "/somewhere")
    provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ

"""Places as people write them: paths from the home or from a folder, and URLs."""

import os
import posixpath

MODEL_FOLDER = "local-dir:"  # what open_clip puts before the folder of a model


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a local path."""
    return "://" in place


def at_home(place: str) -> str:
    """A place whose leading `~` is replaced by the home, as a shell does it. Other places stay as they are.

    Raises:
        ValueError: there is no such home.
    """
    scheme, path = _split(place)
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        raise ValueError(f"no home folder is known for {path}: write the whole path, or ./{path} for a folder of that name")
    return scheme + found


def absolute(place: str, folder: str = "") -> str:
    """A local path made absolute, because workers and later commands have other working directories. URLs stay unchanged.

    Args:
        place: a path or a URL. A leading `~` is the home.
        folder: what relative paths are relative to, a path or a URL; by default the working directory.

    Raises:
        ValueError: there is no such home, or a model's folder would be at a URL.
    """
    scheme, path = _split(at_home(place))
    if is_url(place) or os.path.isabs(path):
        return place if is_url(place) else scheme + os.path.normpath(path)
    if not is_url(folder):
        return scheme + os.path.abspath(os.path.join(folder, path))
    if scheme:
        raise ValueError(f"{place}: a model's folder is on local disk, so its path can't be relative to {folder}")
    protocol, _, above = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(above, path))}"


def folder_of(file: str) -> str:
    """The folder that relative paths in a file are relative to. What comes through a pipe has none: the working directory."""
    if is_url(file):
        return file.rpartition("/")[0]
    path = os.path.abspath(file)
    return os.getcwd() if path.startswith("/dev/") else os.path.dirname(path)


def _split(place: str) -> tuple[str, str]:
    """What stands before a model's folder, and the path."""
    scheme, found, path = place.rpartition(MODEL_FOLDER)
    return scheme + found, path

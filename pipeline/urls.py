"""URLs for people and files: without the credentials that some hold."""

from urllib.parse import urlsplit

HIDDEN = "***"


def masked(place: str) -> str:
    """A path as it is, and a URL without its user, password, query (where signatures are) and fragment."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    user, at, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{HIDDEN + at if user else ''}{host}{parts.path}{'?' + HIDDEN if parts.query else ''}"

"""The token that the processes of Ray on this machine know each other by."""

import os
import secrets

FILE = "~/.ray/auth_token"  # where Ray looks for one, and writes one that is not there
OWN = secrets.token_hex(32)  # one for all sessions of this process, because Ray's native code remembers it


def provide_token() -> None:
    """Give Ray a token in the environment where it can't have one in the home, which may be missing or read-only."""
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() and not _home_serves():
        os.environ["RAY_AUTH_TOKEN"] = OWN


def _home_serves() -> bool:
    """Whether the token is in the home, or can be written there."""
    file = os.path.expanduser(FILE)
    if file == FILE:  # nobody knows where the home is
        return False
    if os.path.exists(file):
        return os.access(file, os.R_OK)
    folder = os.path.dirname(file)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK)

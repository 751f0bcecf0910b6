"""Ask whether there is a Ray cluster at an address. Ray's own client would wait for minutes, and answer no signal meanwhile.

    python -P probe.py ADDRESS

This is a process of its own, so that it can be ended at any time. It prints one line that says why the cluster can't be joined,
and nothing if it can.
"""

import socket
import sys

from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # native
from ray.exceptions import AuthenticationError

CONNECT_S = 5.0
NODE_S = 10  # a node that has just started may still be missing from the cluster's list


def why_not(address: str) -> str | None:
    """Why the cluster can't be joined from here; None if it can.

    Args:
        address: host:port, or `auto` for a cluster that has a node on this machine.
    """
    if address == "auto":
        maybe_enable_token_auth_if_token_available(
            warn_if_disabled=False
        )  # as Ray does, but for a cluster on this machine only
    try:
        found = services.canonicalize_bootstrap_address(address)
        host, port = services.extract_ip_port(found)
    except ConnectionError:
        return "no node of a cluster runs on this machine"
    except ValueError:
        return "that is no host:port, with a port from 1024 to 65535"
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        return f"{found}: {error.strerror or error}"
    try:
        client = GcsClient(address=found)
    except AuthenticationError:
        return (
            "the cluster asks for a token: set RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    except Exception:  # noqa: BLE001  (a server of another kind answers with whatever it likes)
        return f"what listens at {found} is no head of a Ray cluster"
    try:
        services.get_node_to_connect_for_driver(client, timeout_seconds=NODE_S)
    except RuntimeError:
        return "this machine is not a node of the cluster: run it on one, or hand it in with `ecif submit`"
    return None


if __name__ == "__main__":
    if line := why_not(sys.argv[1]):
        print(" ".join(line.split()))

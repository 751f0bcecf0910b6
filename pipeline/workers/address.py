"""Whether RAY_ADDRESS leads to a cluster, found out within seconds."""

import subprocess
import sys
import time
from pathlib import Path

ANSWER_S = 20.0  # for a cluster to answer
WAKE_S = 0.5  # a signal that another thread was given is seen when this one wakes


def why_not(address: str) -> str | None:
    """Why a cluster can't be joined from here; None if it can, as far as can be told.

    Args:
        address: host:port, or `auto` for a cluster that has a node on this machine.
    """
    if "://" in address:
        return (
            "a run joins a cluster on one of its nodes; from outside hand it in: ecif submit CONFIG --address http://HOST:8265"
        )
    command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), address]
    end = time.monotonic() + ANSWER_S
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as probe:
        try:
            while time.monotonic() < end:
                try:
                    told, _ = probe.communicate(timeout=WAKE_S)
                except subprocess.TimeoutExpired:
                    continue
                return told.decode(errors="replace").strip() or None
        finally:
            probe.kill()
    return f"no Ray answers there within {ANSWER_S:.0f} s"

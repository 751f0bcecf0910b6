"""Whether RAY_ADDRESS leads to a cluster, found out within seconds."""

import subprocess
import sys
from pathlib import Path

ANSWER_S = 20.0  # for a cluster to answer


def why_not(address: str) -> str | None:
    """Why a cluster can't be joined from here; None if it can, as far as can be told.

    Args:
        address: host:port, or `auto` for a cluster that has a node on this machine.
    """
    if "://" in address:
        return "a run joins a cluster on one of its nodes; from outside hand it in: ray job submit --address http://HOST:8265"
    command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), address]
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no Ray answers there within {ANSWER_S:.0f} s"
    return told.stdout.decode(errors="replace").strip() or None

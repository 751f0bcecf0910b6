"""What a run waits for: nodes that have not joined yet, and workers that no node has room for."""

import time

import ray
from ray.exceptions import RayError

from pipeline.console import say_at
from pipeline.errors import RunError

JOIN_S = 900.0  # for the first worker to join: a machine with GPUs takes minutes to start
SAY_EVERY_S = 60.0


def wait_for_nodes(kinds: tuple[str, ...]) -> dict[str, float]:
    """Return the cluster's resources once it has one of some kinds, `GPU` or `CPU`.

    Raises:
        RunError: none has joined within JOIN_S.
    """
    start, said = time.monotonic(), -SAY_EVERY_S
    what = " or ".join(kinds)
    while True:
        total: dict[str, float] = ray.cluster_resources()
        if any(total.get(kind, 0) >= 1 for kind in kinds):
            return total
        waited = time.monotonic() - start
        if waited > JOIN_S:
            raise RunError(f"the Ray cluster has no {what}: none has joined within {JOIN_S:.0f} s")
        if waited - said >= SAY_EVERY_S:
            said = waited
            say_at(f"waiting for resources: no {what} has joined the cluster yet; at most {JOIN_S - waited:.0f} s more")
        time.sleep(1.0)


def unmet() -> str | None:
    """What tasks and actors ask for while no node has it free, as in `2 x GPU: 1`; None if nothing waits, or Ray is silent."""
    from ray.autoscaler.v2.sdk import get_cluster_status  # rarely needed, and not free to import

    try:
        demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
    except (RayError, RuntimeError, ValueError):
        return None
    asked = [
        f"{shape.count} x " + (", ".join(f"{kind}: {amount:g}" for kind, amount in sorted(shape.bundle.items())) or "a process")
        for demand in demands
        for shape in demand.bundles_by_count
    ]
    return "; ".join(asked) or None

"""The columns of influence on a target (`ecif.heads.influence`) and of the second order (`ecif.projected.second_order`)."""

from ecif.columns.contract import Column

LEVERAGE = Column(
    "leverage",
    "low",
    "1",
    "Largest share, below 1, that the pair makes up of the curvature along any direction; above 0.5 its influence is an "
    "extrapolation.",
)


def influence_columns(target: str, unit: str = "nats") -> list[Column]:
    """Both parts of the influence on a target, and their sum.

    Args:
        target: its name.
        unit: of the target's loss, which is summed over the target's pairs.
    """
    change = "Predicted change of the target's summed loss if the pair were removed"
    sign = "above 0 the pair helps the target, below 0 it harms it"
    return [
        Column(f"influence_positive_{target}", "high", unit, f"{change} as a positive: its own image and caption."),
        Column(f"influence_negative_{target}", "high", unit, f"{change} as a negative of the other pairs of its batch."),
        Column(f"influence_{target}", "high", unit, f"{change}, positive and negative part together; {sign}."),
    ]

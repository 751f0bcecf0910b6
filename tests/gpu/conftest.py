"""What a GPU computes and how fast: `make gpu`. Where there is none, the same functions run on the CPU in float32."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def to(request: pytest.FixtureRequest) -> torch.device:
    """Where float32 is computed."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[list[str]]:
    """Lines that are printed together at the end."""
    lines: list[str] = []
    yield lines
    if lines:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny inputs"
        print("\n\n" + "\n".join([f"{where}, torch {torch.__version__}", *lines]))

"""Where workers look for modules: where the driver does, so that they import what it runs."""

import itertools
import os
import sys

from ray.job_config import JobConfig


class SameModules(JobConfig):  # type: ignore[misc]  # Ray is half typed
    """Workers look for modules where the driver does. Ray alone would make them look into the working directory first.

    Args:
        path: folders to search, the first one first.
    """

    def __init__(self, path: list[str]):
        super().__init__(_py_driver_sys_path=path[::-1])  # each is put before those that are there

    def _runtime_env_has_working_dir(self) -> bool:
        return True  # then Ray adds neither the working directory nor the script's, which is on the path already


def search_path(own: bool) -> list[str]:
    """Where this process looks for modules.

    Args:
        own: include the standard library and what is installed. Nodes of a cluster have these in places of their own.
    """
    library = os.path.dirname(os.__file__)
    path = sys.path if own else itertools.takewhile(lambda folder: folder != library, sys.path)
    return [os.path.abspath(folder) for folder in path if os.path.exists(folder or os.curdir)]

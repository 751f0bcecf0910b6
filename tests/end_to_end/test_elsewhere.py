"""A run that is started in a folder that holds modules with the names of others': workers import what the driver does."""

import json
import os
import subprocess
import sys

CALL = """
import json, ray
from pipeline.workers.cluster import session

def found():
    import json, numpy, pipeline.storage
    return [module.__file__ for module in (json, numpy, pipeline, pipeline.storage)]

with session(1):
    print(json.dumps([found(), ray.get(ray.remote(found).remote())]))
"""


def test_modules_of_the_working_directory_are_not_taken_for_those_of_the_driver(tmp_path):
    for name in ("json.py", "numpy.py", "pipeline.py", "ecif.py"):
        (tmp_path / name).write_text("raise ImportError('somebody else')")
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-P", "-c", CALL]  # -P: as `ecif`, which does not search the working directory
    for more in ({}, {"RAY_ADDRESS": ""}):
        done = subprocess.run(command, cwd=tmp_path, env=inherited | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        driver, worker = json.loads(done.stdout)
        assert driver == worker
        assert str(tmp_path) not in str(driver)

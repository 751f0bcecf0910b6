"""Where workers look for modules."""

import os
import sys

from pipeline.workers.modules import SameModules, search_path


def test_the_search_path_is_the_drivers_own_with_places_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside").mkdir()
    library = os.path.dirname(os.__file__)
    monkeypatch.setattr(sys, "path", ["", "beside", "nowhere", "__editable__.finder", library, "/usr"])
    assert search_path(own=True) == [str(tmp_path), f"{tmp_path}/beside", library, "/usr"]
    assert search_path(own=False) == [str(tmp_path), f"{tmp_path}/beside"]


def test_ray_adds_no_folder_and_finds_the_first_one_first():
    job = SameModules(["/first", "/second"])
    assert job._runtime_env_has_working_dir()  # it is Ray's own question
    assert list(job._get_proto_job_config().py_driver_sys_path) == ["/second", "/first"]

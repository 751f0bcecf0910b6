"""The CronJobs by Kubernetes' own schema, and the DAG in Airflow itself, each installed into an environment of its own."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import environment
from tests.support.manifests import INFRA, executable, path_with

pytestmark = [pytest.mark.slow, pytest.mark.network]
VALIDATE = """
import sys, yaml, kubernetes_validate
for document in yaml.safe_load_all(sys.stdin):
    if "ray.io" not in document["apiVersion"]:
        kubernetes_validate.validate(document, "1.37", strict=True)
        print(document["kind"])
"""


def test_the_manifests_are_valid(tmp_path):
    programs = environment(tmp_path / "kubernetes", ["install", "kubernetes-validate==1.37.0"], shared=False)

    def validate(text: str) -> subprocess.CompletedProcess[str]:
        command = [programs / "python", "-c", VALIDATE]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)

    manifest = (INFRA / "raycluster.yaml").read_text()
    assert validate(manifest).stdout.split() == ["CronJob"]
    kinds = validate((INFRA / "rayjob.yaml").read_text()).stdout.split()
    assert kinds == ["CronJob", "ServiceAccount", "Role", "RoleBinding"]
    assert "podFailurePolicies" in validate(manifest.replace("podFailurePolicy:", "podFailurePolicies:")).stderr


@pytest.fixture(scope="module")
def airflow(tmp_path_factory) -> dict[str, str]:
    """An environment in which `airflow` knows the DAG, which retries without a pause."""
    folder = tmp_path_factory.mktemp("airflow")
    programs = environment(folder / "venv", ["install", "apache-airflow==3.3.2"], shared=False)
    (folder / "dags").mkdir()
    text = (INFRA / "airflow_dag.py").read_text()
    (folder / "dags" / "nightly.py").write_text(re.sub(r"retry_delay=timedelta\(.*?\)", "retry_delay=timedelta(0)", text))
    (folder / "bin").mkdir()
    executable(folder / "bin", "ecif", 'echo "called: $*"\ncase "$*" in *--retry) exit 0 ;; esac\nexit "$CODE"')
    given = {"AIRFLOW_HOME": str(folder), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "FOLDER": str(folder)}
    given |= {"PATH": f"{folder / 'bin'}{os.pathsep}{path_with(programs)}"}
    subprocess.run(["airflow", "db", "migrate"], env=os.environ | given, check=True, capture_output=True, timeout=300)
    return given


@pytest.mark.parametrize(
    ("code", "states"),
    [(0, ["success"]), (12, ["success"]), (10, ["skipped"]), (2, ["failed"]), (1, ["up_for_retry", "success"])],
)
def test_airflow_runs_the_dag(airflow, code, states):
    command = ["airflow", "dags", "test", "ecif_nightly", f"2026-11-{code + 1:02}"]
    given = os.environ | airflow | {"CODE": str(code)}
    done = subprocess.run(command, env=given, cwd=Path(airflow["FOLDER"]), capture_output=True, text=True, timeout=180)
    said = done.stdout + done.stderr
    assert re.findall(r"new_state=(\w+)", said) == states, said[-3000:]
    assert [line.endswith("--retry") for line in said.splitlines() if line.startswith("called: submit")] == [
        attempt > 0 for attempt in range(len(states))
    ]

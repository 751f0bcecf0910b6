"""What infra/ has is what the package installs and Ray does: versions, ports, commands, tokens. No cluster is needed."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
import ray._private.ray_constants as ray_constants
import yaml
from packaging.requirements import Requirement

from tests.support.closure import EXTRAS, canonical, closure, pins, requirements
from tests.support.manifests import DOCUMENTS, INFRA, executable, parses, path_with

CLUSTERS = [DOCUMENTS["raycluster.yaml", "RayCluster"]["spec"], DOCUMENTS["rayjob.yaml", "RayJob"]["spec"]["rayClusterSpec"]]
CRONJOBS = [DOCUMENTS["raycluster.yaml", "CronJob"]["spec"], DOCUMENTS["rayjob.yaml", "CronJob"]["spec"]]
clusters = pytest.mark.parametrize("cluster", CLUSTERS)


def groups(cluster: dict) -> list[dict]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods() -> list[dict]:
    of_clusters = [group["template"]["spec"] for cluster in CLUSTERS for group in groups(cluster)]
    return [*of_clusters, *(cronjob["jobTemplate"]["spec"]["template"]["spec"] for cronjob in CRONJOBS)]


def test_versions_are_those_installed_here_and_pinned():
    assert {cluster["rayVersion"] for cluster in CLUSTERS} == {version("ray")} == {pins()["ray"]}


def test_pins_cover_what_the_image_installs():
    """Written anew by `python -m tests.support.closure infra/constraints.txt`."""
    assert pins().keys() >= closure().keys()
    for requirement in map(Requirement, requirements()):
        assert requirement.specifier.contains(pins()[canonical(requirement.name)]), requirement


def test_the_image():
    text = (INFRA / "Dockerfile").read_text()
    assert f'".[{",".join(EXTRAS)}]"' in text
    assert "--constraint constraints.txt" in text
    user = re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1]
    assert re.fullmatch(r"[1-9]\d*:\d+", user), "a name can't be told from root"
    assert "ENV HOME=/home/ecif HF_HUB_OFFLINE=1" in text
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (INFRA.parent / name).exists()


@clusters
def test_a_cluster_asks_for_a_token_where_its_job_server_can_be_reached(cluster):
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ecif-ray-token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0"}
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ports["gcs-server"] == ray_constants.DEFAULT_PORT


@clusters
def test_every_node_of_a_cluster(cluster):
    for group in groups(cluster):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys() >= {"models", "scratch"}
        assert mounts["models"]["readOnly"]
        assert volumes["scratch"]["emptyDir"]["sizeLimit"]
        assert mounts["scratch"]["mountPath"] == "/tmp"  # where Ray's session and its spilled objects are by default


@clusters
def test_no_autoscaling_is_promised_which_a_run_does_not_use(cluster):
    assert "enableInTreeAutoscaling" not in cluster
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


@pytest.mark.parametrize("pod", pods())
def test_nobody_is_root_and_nothing_is_secret(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        for variable in container.get("env", []):
            assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]


def test_the_nightly_submission():
    (container,) = CRONJOBS[0]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert parses(container["command"])
    assert {"--nightly", "--exit-zero"} <= set(container["command"])
    name = DOCUMENTS["raycluster.yaml", "RayCluster"]["metadata"]["name"]
    assert container["command"][-1] == f"http://{name}-head-svc:{ray_constants.DEFAULT_DASHBOARD_PORT}"
    assert {variable["name"] for variable in container["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_the_nightly_rayjob_is_created_under_the_day_s_name(tmp_path):
    executable(tmp_path, "kubectl", f'echo "$@" > {tmp_path}/called; cat > {tmp_path}/created')
    (container,) = CRONJOBS[1]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    (tmp_path / "rayjob.yaml").write_text((INFRA / "rayjob.yaml").read_text().partition("\n---\n")[0])
    script = script.replace("/etc/ecif/", f"{tmp_path}/")
    subprocess.run([shell, flag, script], env={"PATH": path_with(tmp_path)}, check=True)
    assert (tmp_path / "called").read_text() == "create -f -\n"
    created = yaml.safe_load((tmp_path / "created").read_text())
    assert re.fullmatch(r"ecif-\d{4}-\d\d-\d\d", created["metadata"].pop("name"))
    assert created["spec"] == DOCUMENTS["rayjob.yaml", "RayJob"]["spec"]
    assert DOCUMENTS["rayjob.yaml", "Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}
    ]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_slurm_script(tmp_path):
    """With stand-ins that write down what they were called with, and with which environment."""
    executable(tmp_path, "srun", f'echo "srun $*" >> {tmp_path}/calls; exec sleep 60')
    executable(tmp_path, "hostname", "echo node1")
    executable(tmp_path, "ray", f'echo "ray $*" >> {tmp_path}/calls')
    executable(tmp_path, "ecif", f'echo "ecif $* at $RAY_ADDRESS" >> {tmp_path}/calls; env > {tmp_path}/env; exit 3')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "96"}
    script = INFRA / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "/shared/my config.yaml"], env={"PATH": path_with(tmp_path)} | slurm, timeout=60)
    assert done.returncode == 3, "the job's exit code is the run's"
    calls = (tmp_path / "calls").read_text()
    ours = "--ntasks-per-node=1 --cpus-per-task=96 --overlap"
    head = f"srun --nodes=1 --ntasks=1 --nodelist=node1 {ours} ray start --head --block --port=20007 --include-dashboard=false"
    assert head in calls
    assert f"srun --nodes=3 --ntasks=3 --exclude=node1 {ours} ray start --address=node1:20007 --block" in calls
    assert "ray health-check --address node1:20007" in calls
    assert "ecif run /shared/my config.yaml at node1:20007" in calls
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_AUTH_TOKEN"] not in calls

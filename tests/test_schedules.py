"""CronJobs, systemd, cron and Airflow understand the exit codes of a night. Stand-ins for `ecif` end with each of them."""

import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from jobs.nights import EXIT_CODES
from jobs.submit import NIGHTS
from tests.support.kubernetes import CronJob, RayJob
from tests.support.manifests import DOCUMENTS, INFRA, executable, parses, path_with
from tests.support.markdown import ROOT, blocks, prose, quoted, table

PAGE = "docs/nightly.md"
CODES = [0, 1, 2, *NIGHTS]
SYSTEMD = INFRA / "systemd"
# Writes down what it was called with, and ends as a night does that CODE tells how to end.
STAND_IN = """printf '%s\\n' "$@" > "$CALLED"
case "$*" in *--exit-zero*) [ "$CODE" -lt 10 ] || exit 0 ;; esac
echo "the log of a night"
exit "$CODE"
"""


@pytest.fixture
def ends_with(tmp_path, monkeypatch):
    """Puts a stand-in for `ecif` on the PATH; gives what reads the words that it was called with."""

    def prepare(code: int):
        executable(tmp_path, "ecif", STAND_IN)
        for name, value in (("PATH", path_with(tmp_path)), ("CALLED", str(tmp_path / "called")), ("CODE", str(code))):
            monkeypatch.setenv(name, value)
        return lambda: (tmp_path / "called").read_text().splitlines()

    return prepare


def test_the_table_has_every_code():
    rows = table(PAGE, "exit code", "what it means").rows
    assert [int(row[0]) for row in rows] == CODES
    assert [int(row[3]) for row in rows] == [0 if code in NIGHTS else code for code in CODES]


def cron_line() -> tuple[list[str], str, str]:
    """When, as whom and what."""
    (line,) = blocks(PAGE, "cron")
    *when, user, command = line.strip().split(maxsplit=6)
    return when, user, command


def nights() -> dict[str, list[str]]:
    """Every `ecif nightly` that a scheduler calls without a job server in between."""
    return {
        "rayjob": shlex.split(DOCUMENTS["rayjob.yaml", "RayJob"]["spec"]["entrypoint"]),
        "systemd": shlex.split(unit("ecif-nightly.service")["Service"]["ExecStart"]),
        "cron": shlex.split(cron_line()[2].partition(" >>")[0]),
    }


def test_the_codes_are_those_of_the_command():
    assert sorted(EXIT_CODES.values()) == [0, *NIGHTS]


@pytest.mark.parametrize("where", ["rayjob", "systemd", "cron"])
def test_nights_are_commands_of_the_package(where):
    words = nights()[where]
    assert words[1] == "nightly"
    assert parses(words)


# Kubernetes


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml"])
def cronjob(request):
    return DOCUMENTS[request.param, "CronJob"]["spec"]


def test_a_cronjob_kills_no_night_and_starts_no_second_one(cronjob):
    spec = CronJob.model_validate(cronjob)
    job = spec.jobTemplate.spec
    assert spec.concurrencyPolicy == "Forbid"
    assert job.activeDeadlineSeconds is None
    assert job.goes_on(code=143, disrupted=True), "a pod that was drained"
    assert not any(job.goes_on(code) for code in (1, 2))


def test_a_mistake_is_not_tried_again_even_where_failures_are():
    spec = DOCUMENTS["raycluster.yaml", "CronJob"]["spec"]
    job = CronJob.model_validate(spec).jobTemplate.spec.model_copy(update={"backoffLimit": 3})
    assert (job.goes_on(1), job.goes_on(2)) == (True, False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("concurrencyPolicy: Forbid", "concurrencyPolicy: forbid"),
        ("podFailurePolicy", "podFailurePolicies"),
        ("containerName: submit", "containerName: submitter"),
        ("values: [2]", "values: [0, 2]"),
        ("restartPolicy: Never", "restartPolicy: OnFailure"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(before, after):
    text = (INFRA / "raycluster.yaml").read_text()
    assert before in text
    _, changed = yaml.safe_load_all(text.replace(before, after))
    with pytest.raises(ValidationError):
        CronJob.model_validate(changed["spec"])


def test_a_rayjob_is_one_night_that_nothing_ends():
    job = RayJob.model_validate(DOCUMENTS["rayjob.yaml", "RayJob"]["spec"])
    assert (job.backoffLimit, job.activeDeadlineSeconds, job.shutdownAfterJobFinishes) == (0, None, True)
    assert shlex.split(job.entrypoint)[-1] == "--exit-zero", "Ray calls a job with another code FAILED"


# One machine


def unit(name: str) -> dict[str, dict[str, str]]:
    """A unit's sections. No key is there twice."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.optionxform = str
    parser.read_string((SYSTEMD / name).read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


def test_the_service_knows_the_exit_codes():
    service = unit("ecif-nightly.service")["Service"]
    assert list(map(int, service["SuccessExitStatus"].split())) == list(NIGHTS)
    assert service["RestartPreventExitStatus"] == "2"
    assert service["Restart"] == "on-failure"
    assert re.fullmatch(r"[1-9]\d*min", service["RestartSec"])
    assert (service["Type"], service["TimeoutStartSec"], service["KillSignal"]) == ("oneshot", "infinity", "SIGTERM")
    assert "RuntimeMaxSec" not in service
    said = table(PAGE, "what", "how")
    for setting in [span for row in said.rows for span in quoted(row[1]) if "=" in span]:
        name, _, value = setting.partition("=")
        assert (service | unit("ecif-nightly.service")["Unit"])[name] == value


def test_a_user_s_secrets_are_in_no_unit():
    service = unit("ecif-nightly.service")["Service"]
    assert service["EnvironmentFile"] == "-/etc/ecif/environment"
    assert service["User"] != "root"
    assert not {"KEY", "SECRET", "TOKEN"} & set(re.findall(r"[A-Z]+", service["Environment"]))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_reads_the_units(tmp_path):
    """A key that it does not know is a line, no exit code."""
    for path in SYSTEMD.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/ecif/bin/ecif", shutil.which("true")))
    units = [str(tmp_path / name) for name in ("ecif-nightly.service", "ecif-nightly.timer")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "ecif-nightly" in line]) == (0, [])
    when = unit("ecif-nightly.timer")["Timer"]["OnCalendar"]
    subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("code", CODES)
def test_cron_mails_what_failed(ends_with, tmp_path, code):
    when, user, command = cron_line()
    assert (len(when), user, "%" in command) == (5, "ecif", False)
    called = ends_with(code)
    here = command.replace("/opt/ecif/bin/", f"{tmp_path}/").replace("/var/lib/ecif/", f"{tmp_path}/")
    done = subprocess.run(here, shell=True, capture_output=True, text=True, check=True)
    assert called() == ["nightly", "/etc/ecif/config.yaml", "--exit-zero"]
    assert done.stdout == ("the log of a night\n" if code in (1, 2) else "")


# Airflow


class SkipError(Exception):
    """In the place of AirflowSkipException."""


class FailError(Exception):
    """In the place of AirflowFailException, which is never tried again."""


@pytest.fixture(params=["airflow.sdk", "airflow.decorators"])
def dag(request, monkeypatch):
    """What the DAG asks of Airflow, of today's and of the one before, and the function of its task."""
    asked = SimpleNamespace(planned=0)

    def task(**options):
        def of(function):
            asked.task, asked.night = options, function
            return lambda: setattr(asked, "planned", asked.planned + 1)

        return of

    def a_dag(**options):
        asked.dag = options
        return lambda function: function

    exceptions = "airflow.sdk.exceptions" if request.param == "airflow.sdk" else "airflow.exceptions"
    modules = {
        "airflow": {},
        request.param: {"dag": a_dag, "task": task},
        exceptions: {"AirflowSkipException": SkipError, "AirflowFailException": FailError},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("airflow_dag", INFRA / "airflow_dag.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return asked


def test_the_dag_is_one_task_a_night(dag):
    assert (dag.dag["max_active_runs"], dag.dag["catchup"], dag.planned) == (1, False, 1)
    assert dag.dag["start_date"].tzinfo
    assert dag.task["retries"] > 0
    assert dag.task["execution_timeout"] is None


OUTCOMES = {0: 0, 11: 11, 12: 12, 10: SkipError, 2: FailError, 1: RuntimeError, 130: RuntimeError}


@pytest.mark.parametrize("code", OUTCOMES)
@pytest.mark.parametrize("attempt", [1, 2])
def test_the_task_of_the_dag(dag, ends_with, code, attempt):
    assert set(CODES) <= set(OUTCOMES)
    called, expected = ends_with(code), OUTCOMES[code]
    ti = SimpleNamespace(try_number=attempt)
    if isinstance(expected, int):
        assert dag.night(ti=ti) == expected
    else:
        with pytest.raises(expected):
            dag.night(ti=ti)
    assert called()[0] == "submit"
    assert "--nightly" in called()
    assert ("--retry" in called()) == (attempt > 1)
    assert parses(["ecif", *called()])


def test_the_page_says_what_the_task_does():
    rows = table(PAGE, "exit code", "the task").rows
    doing = {int(code): row[1].split()[0] for row in rows for code in re.findall(r"\d+", row[0])}
    assert doing == {0: "succeeds", 11: "succeeds", 12: "succeeds", 10: "is", 1: "is", 130: "is", 2: "fails"}


def test_no_schedule_is_left_out():
    files = {str(path.relative_to(ROOT)) for path in [*SYSTEMD.iterdir(), INFRA / "airflow_dag.py"]}
    assert files <= set(quoted(prose(PAGE)))

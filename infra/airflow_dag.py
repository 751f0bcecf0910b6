"""An Airflow DAG as an example: every night `ecif submit --nightly` hands a night in to a cluster, and follows it.

Airflow's workers need the package, which may have an environment of its own, and the cluster's token: RAY_AUTH_MODE=token and
RAY_AUTH_TOKEN_PATH in their environment. Fill in the constants. What the task does after each exit code is in docs/nightly.md.
"""

import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

try:
    from airflow.sdk import dag, task
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
except ImportError:  # before Airflow 3.2
    from airflow.decorators import dag, task
    from airflow.exceptions import AirflowFailException, AirflowSkipException

ECIF = "ecif"  # or its path, such as /opt/ecif/bin/ecif
CONFIG = "s3://bucket/config.yaml"
ADDRESS = "http://ecif-head-svc:8265"


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # one night takes all that is new, so a missed one is not made up for
    max_active_runs=1,
)
def ecif_nightly() -> None:
    """One task a night."""

    @task(retries=3, retry_delay=timedelta(minutes=10), execution_timeout=None)  # the deadline is in CONFIG
    def night(ti: Any = None) -> int:
        """Follow tonight's job to its end, whoever has submitted it."""
        again = ["--retry"] if ti.try_number > 1 else []
        command = [ECIF, "submit", CONFIG, "--nightly", "--address", ADDRESS, *again]
        code = subprocess.run(command, check=False).returncode
        if code == 10:
            raise AirflowSkipException("nothing new")
        if code == 2:
            raise AirflowFailException("a mistake, see the log: the same command would fail again")
        if code not in (0, 11, 12):
            raise RuntimeError(f"exit code {code}")
        return code

    night()


ecif_nightly()

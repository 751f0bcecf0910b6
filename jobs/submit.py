"""`ecif submit`: hand a run in to a cluster from outside, once a day, and follow it."""

import hashlib
import os
import re
import shlex
import sys
from datetime import UTC, date, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pipeline.console import say
from pipeline.errors import RunError, UserError
from pipeline.places import is_url
from pipeline.urls import masked

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from jobs.job_server import JobServer

ENV = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # in Ray's client these win over the address that it is given
NIGHTS = {  # exit codes of a night that has not failed; Ray calls any job FAILED whose exit code is not 0
    10: "nothing new",
    11: "the deadline was reached, and the next night goes on",
    12: "done, and a bound of drift was passed",
}


class Attempt(NamedTuple):
    """One submission of a run; attempts are ordered by day, then by number."""

    day: date
    number: int

    def id_of(self, run: str) -> str:
        """The submission id. The first attempt of a day has no number."""
        return f"{run}-{self.day.isoformat()}" + (f"-{self.number}" if self.number > 1 else "")


def run_name(config: str, nightly: bool = False) -> str:
    """What the submission ids of a configuration's runs, or of its nights, begin with: a function of its path or URL alone."""
    stem = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(config).stem.lower()).strip("-")[:30]
    return f"ecif-{stem or 'run'}-{hashlib.sha256(config.encode()).hexdigest()[:8]}" + ("-nightly" if nightly else "")


def attempt_of(run: str, submission: str | None) -> Attempt | None:
    """Which attempt of a run a submission id stands for; None if it is of something else."""
    match = re.fullmatch(re.escape(run) + r"-(\d{4}-\d\d-\d\d)(?:-(\d+))?", submission or "")
    return Attempt(date.fromisoformat(match[1]), int(match[2] or 1)) if match else None


def entrypoint(config: str, nightly: bool = False, exit_zero: bool = False) -> str:
    """The command of the job, quoted for the shell that Ray runs it in."""
    options = ["--exit-zero"] if exit_zero else []
    return shlex.join(["ecif", "nightly" if nightly else "run", config, *options])


def check(config: str) -> None:
    """Raise UserError where a configuration can't be read on the cluster, or its place would tell a secret there."""
    if not is_url(config) and not os.path.isabs(config):
        raise UserError(f"{config}: the head node reads it, so it is an absolute path there or a URL")
    if masked(config) != config:
        raise UserError(f"{masked(config)}: no credentials in CONFIG, because a job server shows the command of every job")


def submit(  # noqa: PLR0913  (each is an option of the command)
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file that the head node reads: absolute path or URL")],
    address: Annotated[str, typer.Option(metavar="URL", help="job server of the cluster")] = "http://127.0.0.1:8265",
    nightly: Annotated[bool, typer.Option("--nightly", help="a night, `ecif nightly`, in the place of a run")] = False,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="with --nightly: exit code 0 also where it would be 10, 11 or 12")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="start again what failed or was stopped today")] = False,
    wait: Annotated[bool, typer.Option(help="follow the log to the end; the exit code is the job's")] = True,
    status: Annotated[bool, typer.Option("--status", help="say how the last job stands; start nothing")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="stop the job; what is written stays")] = False,
) -> None:
    """Run on a cluster from outside, at most once a day: a second call finds the first one's job."""
    if retry + status + stop > 1:
        raise UserError("give one of --retry, --status and --stop")
    if exit_zero and not nightly:
        raise UserError("--exit-zero needs --nightly: a run has no exit code that it concerns")
    check(config)
    for name in ENV:
        os.environ.pop(name, None)
    from jobs.job_server import JobServer, exit_code

    server, run = JobServer(address), run_name(config, nightly)
    jobs = {attempt: job for job in server.list_jobs() if (attempt := attempt_of(run, job.submission_id))}
    last = max(jobs, default=None)
    if status or stop:
        if last is None:
            raise UserError(f"{address}: no job of {config} there; it would be {run}-DAY")
        name = last.id_of(run)
        if stop:
            server.stop_job(name)
            say(f"{name} is told to stop: --status says when it has")
        typer.echo(f"{name} {_said(server.get_job_info(name))}")
        return
    name = _start(server, run, entrypoint(config, nightly, exit_zero), jobs, retry)
    if not wait:
        typer.echo(name)
        return
    try:
        job = server.follow(name, _show)
    except KeyboardInterrupt:
        say(f"{name} goes on: the same command follows it, --stop ends it")
        raise typer.Exit(130) from None
    code = exit_code(job)
    if code in NIGHTS:
        say(f"{name} has ended: {_said(job)}")
        raise typer.Exit(0 if exit_zero else code)
    if code:
        what = (job.message or "").strip().splitlines()[:1] or [""]
        again = "once that is mended, --retry" if code == 2 else "--retry"
        say(f"{name} {job.status.value}: {what[0].partition(', last available')[0]} ({again} starts it again)")
    raise typer.Exit(code)


def _said(job: "JobDetails") -> str:
    """How a job stands: Ray's word, but of a night that has not failed what it did."""
    from jobs.job_server import exit_code

    code = exit_code(job) if job.status == "FAILED" else None
    return f"{NIGHTS[code]} (exit code {code})" if code in NIGHTS else job.status.value


def _start(server: "JobServer", run: str, command: str, jobs: "dict[Attempt, JobDetails]", retry: bool) -> str:
    """The id of the job to follow: one that goes on, today's, or a new one."""
    today = datetime.now(UTC).date()
    last = max(jobs, default=Attempt(date.min, 0))
    ended = last in jobs and jobs[last].status.is_terminal()
    if last in jobs and not ended:
        say(f"{last.id_of(run)} goes on: nothing is started")
        return last.id_of(run)
    if last.day == today:
        said = _said(jobs[last])
        failed = said in ("FAILED", "STOPPED")
        if not (failed and retry):
            hint = "; --retry starts it again" if failed else ""
            say(f"{last.id_of(run)} of today has ended, {said}: nothing is started{hint}")
            return last.id_of(run)
    name = Attempt(today, last.number + 1 if last.day == today else 1).id_of(run)
    say(f"submitting {name}")
    where = shlex.join(["--address", server.place, "--submission-id", name])
    say(f"as does: ray job submit {where} -- {command}")
    try:
        server.submit_job(entrypoint=command, submission_id=name)
    except RunError:
        if name not in {job.submission_id for job in server.list_jobs()}:
            raise
        say(f"{name} was submitted by another at the same time")
    return name


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

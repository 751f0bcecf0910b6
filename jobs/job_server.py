"""The job server of a Ray cluster: reached within seconds or one line, and a job's log followed to its end."""

import asyncio
import ipaddress
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.errors import RunError, UserError

ANSWER_S = 10.0  # for the server to say what it is
REQUEST_S = 60.0  # for each further answer
LOST_S = 120.0  # a tunnel may be set up anew while a job is followed
FORM = "http://HOST:8265, the dashboard of the head node or a tunnel to it"


class JobServer(JobSubmissionClient):  # type: ignore[misc]  # Ray is half typed
    """Ray's client, whose requests end, and whose errors are one line.

    Args:
        address: http(s)://HOST:PORT.

    Raises:
        UserError: no job server answers there, or it wants another token.
    """

    def __init__(self, address: str):
        place = urlsplit(address)
        if place.scheme not in ("http", "https") or not place.hostname or place.query or place.fragment:
            raise UserError(f"--address is {FORM}")
        if place.username or place.password:
            raise UserError(f"--address: no credentials in a URL; it is {FORM}")
        self.place = address
        _greet(address)
        for name in ("ray", JobSubmissionClient.__module__):
            logging.getLogger(name).setLevel(logging.ERROR)
        if _is_loopback(place.hostname):
            _take_token_at_hand()
        try:
            super().__init__(address)
        except AuthenticationError as error:
            what = "refuses the token that it was given" if "invalid" in str(error) else "asks for a token"
            raise UserError(
                f"{address}: the cluster {what}: set RAY_AUTH_MODE=token, and have the cluster's token in RAY_AUTH_TOKEN, "
                "in the file RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"
            ) from None

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, timeout=REQUEST_S, **options)

    def _raise_error(self, r: Any) -> None:
        last = str(r.text).strip().splitlines()[-1:] or [""]
        raise RunError(f"{self.place}: the job server answers {r.status_code}: {last[0][:300]}")

    def follow(self, name: str, write: Callable[[str], object]) -> JobDetails:
        """Write a job's log as it grows, from its beginning, until the job has ended.

        Raises:
            RunError: the server has not answered for a while. The job goes on.
        """
        shown, answered = 0, time.monotonic()

        def show(text: str) -> None:
            nonlocal shown
            write(text)
            shown += len(text)

        while True:
            try:
                job = self.get_job_info(name)
                if job.status.is_terminal():
                    show(self.get_job_logs(name)[shown:])
                    return job
                answered = time.monotonic()
                asyncio.run(self._tail(name, shown, show))
            except Exception as error:  # noqa: BLE001  (of aiohttp, requests or Ray: whatever breaks when a tunnel does)
                if time.monotonic() - answered > LOST_S:
                    raise RunError(f"{self.place}: the job server is lost ({error}); {name} may go on there") from None
            time.sleep(1)

    async def _tail(self, name: str, skip: int, show: Callable[[str], None]) -> None:
        async for text in self.tail_job_logs(name):
            show(text[skip:])
            skip = max(0, skip - len(text))


def exit_code(job: JobDetails) -> int:
    """The exit code of a job that has ended; 1 where it was stopped or never ran."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code if job.driver_exit_code and 0 < job.driver_exit_code < 256 else 1


def _greet(address: str) -> None:
    """Ask what listens there. Ray's client would wait for ever for a server that accepts and says nothing.

    Raises:
        UserError: it is no job server.
    """
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S) as answer:
            if "ray_version" in json.loads(answer.read(1 << 16)):
                return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # the cluster asks for a token
            return
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        hint = "has Ray a job server on the head, as ecif[cluster] installs it? is the tunnel open?"
        raise UserError(f"{address}: {reason} ({hint})") from None
    except TimeoutError:
        raise UserError(f"{address}: no answer within {ANSWER_S:.0f} s") from None
    except (ValueError, OSError):  # no JSON, or no HTTP at all
        pass
    raise UserError(f"{address}: what listens there is no job server of Ray: --address is {FORM}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _take_token_at_hand() -> None:
    """Use the token in the home or the environment, as `ray start` on this machine does. No other host gets it unasked."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)

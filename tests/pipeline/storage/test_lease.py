"""One run at a time in a run folder, on local disk and on S3: held against real processes that are stopped and killed."""

import json
import multiprocessing
import os
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.errors import RunError, UserError
from pipeline.run import run
from pipeline.storage.lease import BEATS, hold_folder
from pipeline.workers.progress import Stage
from tests.support.lease_holder import hold_and_write

TTL = 2.0
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"s3://{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


class Other:
    """Another process that tries to hold a folder, and writes into it on request."""

    def __init__(self, folder: str, ttl: float, start=None):
        self.pipe, there = PROCESSES.Pipe()
        arguments = (folder, ttl, there, dict(os.environ), start)
        self.process = PROCESSES.Process(target=hold_and_write, args=arguments, daemon=True)
        self.process.start()

    def answer(self) -> str:
        assert self.pipe.poll(60), "the other process says nothing"
        return self.pipe.recv()

    def write(self, url: str) -> str:
        self.pipe.send(url)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def others(folder):
    """Starts other processes on the folder."""
    started = []

    def start(*args) -> Other:
        started.append(Other(folder, *args))
        return started[-1]

    yield start
    for other in started:
        other.kill()


def lease_objects(folder) -> dict[str, dict]:
    listed = storage.listing(storage.join(folder, "lease"), ".json")
    return {item.url.rsplit("/", 1)[-1]: json.loads(storage.read_bytes(item.url)) for item in listed}


def move_to_another_machine(folder) -> None:
    """Make the lease one of which nobody here can tell whether its process lives."""
    ((name, facts),) = lease_objects(folder).items()
    storage.write_bytes(storage.join(folder, "lease", name), json.dumps(facts | {"machine": "elsewhere"}).encode())


def test_runs_one_after_the_other_do_not_wait_and_have_growing_tokens(folder):
    started, tokens = time.monotonic(), []
    for _ in range(3):
        with hold_folder(folder) as lease:
            tokens.append(lease.token)
    with pytest.raises(ZeroDivisionError), hold_folder(folder) as lease:
        raise ZeroDivisionError
    assert [*tokens, lease.token] == [1, 2, 3, 4]
    assert time.monotonic() - started < 20
    assert list(lease_objects(folder)) == ["00000004.json"], "what earlier runs left is gone"


def test_a_held_folder_is_refused_as_soon_as_the_holder_is_seen_to_live(folder, capsys):
    with hold_folder(folder, 10.0):
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"another run is at work in .*process {os.getpid()} on"), hold_folder(folder):
            pass
        assert time.monotonic() - started < 5
    assert "waiting up to 10 s to see whether it lives" in capsys.readouterr().err
    with hold_folder(folder) as lease:
        assert lease.token == 2, "who was refused has taken nothing"


def test_of_processes_that_start_at_once_exactly_one_holds_the_folder(folder, others):
    start = PROCESSES.Event()
    racing = [others(4.0, start) for _ in range(4)]
    start.set()
    answers = [other.answer() for other in racing]
    assert sorted(answer.split(":")[0] for answer in answers) == ["UserError"] * 3 + ["held"]
    assert racing[answers.index("held")].write("") == "released"


def test_of_runs_that_find_an_abandoned_folder_exactly_one_takes_it_over(folder):
    storage.write_bytes(storage.join(folder, "lease", "00000041.json"), b'{"machine": "elsewhere", "ttl": 0.5}')
    refused = threading.Semaphore(0)

    def take(_) -> int | None:
        try:
            with hold_folder(folder, 10.0) as lease:
                assert all(refused.acquire(timeout=30) for _ in range(5))
                return lease.token
        except UserError:
            refused.release()
            return None

    with ThreadPoolExecutor(6) as pool:
        tokens = list(pool.map(take, range(6)))
    assert sorted(filter(None, tokens)) == [42]


def test_what_a_process_of_this_machine_held_when_it_was_killed_is_free_at_once(folder, others):
    other = others(60.0)
    assert other.answer() == "held"
    other.kill()
    started = time.monotonic()
    with hold_folder(folder) as lease:
        assert lease.token == 2
    assert time.monotonic() - started < 20


def test_what_a_process_elsewhere_held_when_it_crashed_is_free_after_the_stated_time(folder, others):
    other = others(TTL)
    assert other.answer() == "held"
    other.kill()
    move_to_another_machine(folder)
    started = time.monotonic()
    with hold_folder(folder) as lease:  # it is the holder that states the time
        assert lease.token == 2
    assert TTL <= time.monotonic() - started < 20


def test_a_run_that_was_only_slow_writes_nothing_after_another_took_over(folder, others):
    url = storage.join(folder, "run.json")
    slow = others(TTL)
    assert slow.answer() == "held"
    assert slow.write(url) == "written"
    os.kill(slow.process.pid, signal.SIGSTOP)
    for token in (2, 3):  # the second one deletes what the first left: the slow run finds its next token free
        with hold_folder(folder, TTL) as lease:
            assert lease.token == token
            storage.write_bytes(url, b"mine")
    os.kill(slow.process.pid, signal.SIGCONT)
    assert slow.write(url).startswith("RunError: another run has taken over")
    assert storage.read_bytes(url) == b"mine"
    assert lease_objects(folder)["00000003.json"]["released"], "nor does it touch the other's lease"


def test_a_run_that_was_only_slow_goes_on_where_nobody_took_over(folder, others):
    slow = others(TTL)
    assert slow.answer() == "held"
    os.kill(slow.process.pid, signal.SIGSTOP)
    time.sleep(1.5 * TTL)
    os.kill(slow.process.pid, signal.SIGCONT)
    assert slow.write(storage.join(folder, "run.json")) == "written"
    assert max(lease_objects(folder)) > "00000001.json", "its old token no longer proves anything"


def test_a_lost_lease_ends_a_stage_and_every_kind_of_write(folder, tmp_path_factory):
    local = tmp_path_factory.mktemp("scratch") / "shard.tar"
    local.write_bytes(b"data")
    url = storage.join(folder, "there")
    storage.write_bytes(url, b"before")
    with hold_folder(folder, TTL), Stage("test", 10) as stage:
        stage.advance(1)
        storage.put_bytes(storage.join(folder, "lease", "00000002.json"), b"{}", new=True)
        time.sleep(3 * TTL / BEATS)
        attempts = {
            "stage": lambda: stage.advance(1),
            "write": lambda: storage.write_bytes(url, b"after"),
            "upload": lambda: storage.upload(str(local), url),
            "delete": lambda: storage.delete(url),
        }
        for attempt in attempts.values():
            with pytest.raises(RunError, match="taken over"):
                attempt()
    assert storage.read_bytes(url) == b"before"
    storage.write_bytes(url, b"after")  # who holds nothing is free to write


def test_a_new_object_is_created_once(folder):
    url = storage.join(folder, "a")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: _created(url, b"%d" % i), range(8)))
    assert answers.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % answers.index(True)


def _created(url, data) -> bool:
    try:
        storage.put_bytes(url, data, new=True)
    except FileExistsError:
        return False
    return True


def test_a_folder_that_nothing_can_be_written_to_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"can't write to {tmp_path}/file: NotADirectoryError"), hold_folder(f"{tmp_path}/file"):
        pass


def test_a_second_run_in_a_held_folder_is_refused_before_anything_starts(tmp_path, tiny_model):
    pairs = storage.join(str(tmp_path), "pairs", "00000.tar")
    storage.write_bytes(pairs, bytes(1024))
    clean = {"clean": {"shards": pairs}}
    folder = str(tmp_path / "run")
    config = Config.model_validate(
        {"run": folder, "corpus": {"shards": pairs}, "model": {"name": tiny_model}, "targets": clean}
    )
    with hold_folder(folder, TTL), pytest.raises(UserError, match=f"another run is at work in {folder}"):
        run(config)
    assert os.listdir(folder) == ["lease"]

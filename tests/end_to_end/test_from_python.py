"""A run that is called from Python: what it needs, what it gives, and what it leaves behind in the calling process."""

import json
import subprocess
import sys

CALL = """
import json, logging, os, signal, sys
import ray, torch
from pipeline import Config, open_run, run

signal.signal(signal.SIGTERM, lambda *_: None)
torch.set_num_threads(2)

def state():
    context = ray.data.DataContext.get_current()
    loggers = [logging.getLogger(name) for name in ("", "ray", "ray.data", "ecif")]
    return {
        "environment": dict(os.environ),
        "handlers": [repr(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)],
        "threads": torch.get_num_threads(),
        "loggers": [[logger.level, logger.propagate, len(logger.handlers)] for logger in loggers],
        "context": [context.enable_progress_bars, context.raise_original_map_exception, context.target_max_block_size],
        "ray": ray.is_initialized(),
        "modules": "open_clip" in sys.modules,
    }

config = Config.model_validate(json.load(sys.stdin))
before = state()
done = run(config)
after = state()
before["modules"] = after["modules"]
print(json.dumps({
    "left": {name: [before[name], after[name]] for name in before if before[name] != after[name]},
    "scored": done.scored,
    "same": done.scores().equals(open_run(config.run).scores()),
}))
"""


def test_a_run_leaves_the_calling_process_as_it_found_it_and_says_nothing_unless_asked(configure, tmp_path):
    asked = configure(tmp_path / "run").model_dump_json()
    done = subprocess.run([sys.executable, "-c", CALL], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"left": {}, "scored": 108, "same": True}
    assert "done in" not in done.stderr

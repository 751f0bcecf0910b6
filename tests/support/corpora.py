"""Real pairs, and the settings of a small run."""

from importlib.resources import files
from pathlib import Path

EMBEDDED = Path(str(files("jobs.demo") / "corpus"))
SETTINGS = {
    "batch_size": 16,
    "workers": 1,  # a process takes longer to start than anything here takes
    "embed": {"part_size": 10},
    "fit": {"folds": 3, "epochs": 2},
    "solve": {"iterations": 6, "refits": 4, "dampings": [0.01, 0.1], "target_batch": 8},
    "score": {"repeats": 2},
}
BASELINES = ["negclip_loss", "normsim_2", "normsim_inf", "lemon", "gsc", "gradient_norm"]
ON_REQUEST = {  # everything that such a run can be asked for beside that
    "index": {"rank": [8, 6], "damping": 0.05},
    "score": {"repeats": 2, "order": 2, "order_rank": [4, 4], "columns": BASELINES},
    "scoring": {"mode": "forward", "parameters": ["visual.proj", "text_projection"], "sample": 40, "epochs": 1},
}

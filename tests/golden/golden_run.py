"""Twenty steps of configs/tiny.yaml on the embedded text, and what they gave when they were last looked at.

`make golden` writes golden/tiny_cpu.txt anew; a commit that does so says why the numbers moved.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

FILE = Path(__file__).with_name("tiny_cpu.txt")
COLUMNS = ("step", "tokens", "train_loss", "mtp_loss", "balance_loss", "grad_norm", "val_loss", "val_bpb")
STEPS = 20


def rows(folder: Path) -> list[dict[str, str]]:
    """Train, and give the columns above."""
    import fathom

    torch.set_num_threads(1)
    changes = {
        "training.output_dir": str(folder),
        "training.max_steps": STEPS,
        "training.logging_steps": 1,
        "training.eval_steps": 10,
        "training.sample_frequency": None,
        "training.save_steps": None,
        "logging.progress": "quiet",
        "logging.hardware_seconds": 0,
        "hardware.precision": "float32",
    }
    fathom.train(Path(__file__).parents[2] / "configs" / "tiny.yaml", changes)
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: row[name] for name in COLUMNS} for row in csv.DictReader(file)]


def written() -> list[dict[str, str]]:
    """The rows of the file."""
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))

"""metrics.jsonl, the diary of a run, and whoever else wants to read along."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that are whole: the last one may be half written."""
    rows = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def best_row(run: Path) -> dict | None:
    """The evaluation with the lowest validation loss, if there is one."""
    rows = [row for row in read_metrics(run) if "val_loss" in row]
    return min(rows, key=lambda row: row["val_loss"], default=None)


class MetricsLog:
    """metrics.jsonl of a run: one JSON object a line.

    Opening it cuts it back to `mark`, its length and sha256 at the checkpoint of `step`; the
    evaluation of that very step, which follows the mark, may stay: then `evaluated` is true. Raises
    ValueError if what stands before the mark has changed.
    """

    def __init__(self, run: Path, step: int, mark: dict | None):
        path = run / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        kept = content[: mark["bytes"] if mark else 0]
        if mark and hashlib.sha256(kept).hexdigest() != mark["sha256"]:
            raise ValueError(
                f"{path} is not what it was at step {step}: bring it back, or move {run} away"
            )
        following = content[len(kept) :].splitlines(keepends=True)[:1]
        self.evaluated = bool(mark and following and is_evaluation(following[0], step))
        if self.evaluated:
            kept += following[0]
        if kept != content:
            os.truncate(path, len(kept))
        self.file, self.sha256, self.bytes = open(path, "ab"), hashlib.sha256(kept), len(kept)

    def write(self, row: dict) -> None:
        line = json.dumps(row).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self.sha256.update(line)
        self.bytes += len(line)

    def mark(self) -> dict:
        """What a checkpoint remembers of the log."""
        os.fsync(self.file.fileno())
        return {"bytes": self.bytes, "sha256": self.sha256.hexdigest()}


def is_evaluation(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
        return line.endswith(b"\n") and row["step"] == step and "val_loss" in row
    except (ValueError, KeyError, TypeError):
        return False


def start_trackers(s, run: Path) -> list:
    """What settings `s` ask for: functions that take each row of metrics, and None at the end."""
    trackers = []
    if s.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ValueError("tensorboard=True needs it: pip install tensorboard") from e
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(row):
            if row is None:
                return writer.close()
            for key, value in row.items():
                if key != "step" and value is not None:
                    writer.add_scalar(key, value, row["step"])

        trackers.append(to_tensorboard)
    if s.wandb:
        try:
            import wandb
        except ImportError as e:
            raise ValueError(f"wandb={s.wandb!r} needs it: pip install wandb") from e
        session = wandb.init(project=s.wandb, name=run.name, config=asdict(s), dir=run)
        trackers.append(lambda row: session.log(row, row["step"]) if row else session.finish())
    return trackers

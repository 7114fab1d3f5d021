"""metrics.jsonl, the diary of a run, and whoever else wants to read along."""

import hashlib
import json
import os
import secrets
from pathlib import Path

from engine import settings

KEYS = ("step", "tokens")  # every row has them


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl up to the first one that is not whole."""
    rows = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not all(isinstance(row.get(k), int) for k in KEYS):
                break
            rows.append(row)
    return rows


def best_row(run: Path) -> dict | None:
    """The evaluation with the lowest validation loss, if there is one."""
    rows = [row for row in read_metrics(run) if row.get("val_loss") is not None]
    return min(rows, key=lambda row: row["val_loss"], default=None)


def since_best(run: Path) -> int:
    """How many evaluations there were after the best one."""
    steps = [row["step"] for row in read_metrics(run) if "val_loss" in row]
    best = best_row(run)
    return len(steps) - 1 - steps.index(best["step"]) if best else len(steps)


class MetricsLog:
    """metrics.jsonl of the run `s.out`, one JSON object a line, and its sha256 at the last mark.

    Opening it cuts it back to `mark`, its length and sha256 at the checkpoint of `step`, unless all
    of it is as it was marked last: then it may end with the evaluation of that very step, and
    `evaluated` is true. Raises ValueError if what stands before the mark has changed.
    """

    def __init__(self, s, step: int, mark: dict | None):
        run = Path(s.out)
        self.path, self.checksum = run / "metrics.jsonl", run / "metrics.sha256"
        content = self.path.read_bytes() if self.path.exists() else b""
        length = mark["bytes"] if mark else 0
        if mark and hashlib.sha256(content[:length]).hexdigest() != mark["sha256"]:
            raise ValueError(
                f"{self.path} is not what it was at step {step}: bring it back, or begin anew with"
                " --fresh"
            )
        recorded = self.checksum.read_text(errors="replace") if self.checksum.exists() else ""
        behind = content[length:].splitlines()
        untouched = recorded == self.line(hashlib.sha256(content))
        self.evaluated = untouched and [json.loads(row)["step"] for row in behind] == [step]
        if behind and not self.evaluated:
            print(f"{self.path}: cut back to step {step}, {len(behind)} rows dropped")
            os.truncate(self.path, length)
            content = content[:length]
        self.bytes, self.sha256 = len(content), hashlib.sha256(content)
        self.file = open(self.path, "ab")
        self.trackers = start_trackers(s, run, step)

    def line(self, sha256) -> str:
        return f"{sha256.hexdigest()}  metrics.jsonl\n"  # as `sha256sum --check` reads it

    def write(self, row: dict) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as e:
            raise OSError(f"{self.path} could not be written ({e.strerror})") from e
        self.sha256.update(line)
        self.bytes += len(line)
        for track in self.trackers:
            track(row)

    def mark(self) -> dict:
        """Makes all rows so far durable; a checkpoint remembers what it returns."""
        os.fsync(self.file.fileno())
        self.checksum.write_text(self.line(self.sha256))
        return {"bytes": self.bytes, "sha256": self.sha256.hexdigest()}

    def close(self) -> None:
        for track in self.trackers:
            track(None)
        self.file.close()


def start_trackers(s, run: Path, step: int) -> list:
    """What settings `s` ask for: functions that take each row of metrics, and None at the end."""
    trackers = []
    if s.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

        def to_tensorboard(row):
            if row is None:
                return writer.close()
            for key, value in row.items():
                if key != "step" and value is not None:
                    writer.add_scalar(key, value, row["step"])

        trackers.append(to_tensorboard)
    if s.wandb:
        import wandb

        # one run there for one run here, however often it is interrupted
        known = run / "wandb.id"
        if not known.exists():
            known.write_text(secrets.token_hex(8))
        this = dict(project=s.wandb, id=known.read_text(), name=run.name, dir=run)
        session = wandb.init(**this, resume="allow", config=settings.flat(s))
        trackers.append(lambda row: session.log(row, row["step"]) if row else session.finish())
    return trackers

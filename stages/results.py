"""What the driver keeps: the seconds of each stage, and the evaluation's summary with them filled in."""

import json
from pathlib import Path

from pipeline.errors import UserError


class Seconds:
    """Seconds spent in each stage, all calls together; kept in a file for runs that find the stage up to date."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.taken: dict[str, float] = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # only a note: losing it must not stop a run
            self.taken = {}

    def add(self, stage: str, seconds: float) -> None:
        self.taken[stage] = round(self.taken.get(stage, 0) + seconds, 1)
        write_json(self.path, self.taken)

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.taken.items()) or "nothing ran"


def summary(path: Path, clock: Seconds) -> dict:
    """The evaluation's summary with `seconds` filled in.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): delete {path.parent} and run again") from error
    return {**found, "seconds": clock.taken}


def keep(content: dict, path: Path) -> None:
    """Writes the summary unless the file already says the same."""
    if not path.exists() or path.read_text() != _dump(content):
        write_json(path, content)


def write_json(path: Path, content: dict) -> None:
    """Replaces a JSON file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_dump(content))
    part.replace(path)


def _dump(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

"""What to type to make a comparison again: make's commands with exactly the settings that differ from the defaults."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config

DEMO = "runs/demo"
PYTHON = ".venv/bin/python"
USUAL = ("sft", "lavender")  # what `make eval` trains when no arms are named
VARIABLES = {"data": "DATA", "teacher": "TEACHER", "model": "MODEL"}
# How a stage is carried out, which changes nothing about what it finds.
RUNTIME = {"eval.workers", "eval.device", "eval.summary", "dry_run", "overwrite", "seed"}


def commands(cfg: Config, runs: Sequence[tuple[str, int, Mapping]]) -> str:
    """The lines that train, evaluate and report again; each also runs what is needed before it.

    Args:
        runs: arm, seed and the settings in its receipt of every trained run in the comparison. What a run was really
            trained with is told, whatever the settings of now would train.
    """
    demo = Path(cfg.runs_dir) == Path(DEMO)
    unasked = RUNTIME | set(VARIABLES) | {"arm"} | ({"runs_dir", "eval.arms", "eval.seeds"} if demo else set())
    given = [o for o in overrides(cfg) if o.partition("=")[0] not in unasked and not o.startswith("arm.")]
    chosen = [(variable, _choice(cfg, group)) for group, variable in VARIABLES.items()]
    if demo:
        own = [pair for pair in chosen if pair not in (("DATA", "world"), ("TEACHER", "tiny"), ("MODEL", "tiny"))]
        arms, seeds = (list(dict.fromkeys(run[place] for run in runs)) for place in (0, 1))
        return _line("demo", [*own, ("SEEDS", str(len(seeds))), ("ARMS", ",".join(arms))], given)
    apart = ("train.", "align.", "eval.", "eval=", "+eval.", "report.", "model.")
    before = [o for o in given if not o.startswith(apart)]
    lines = [
        _line("train", [*chosen, ("ARM", arm), ("SEED", str(seed))], [*before, *_trained(cfg, arm, settings)])
        for arm, seed, settings in runs
    ]
    if not runs or _usual(cfg, runs):
        suite, rest = _suite(cfg, given)
        lines += [_line(target, [*chosen, *suite], rest) for target in ("eval", "report")]
    else:  # make would train the usual arms as well, or refuse those that were trained with other settings
        whole = [*(f"{group}={_choice(cfg, group)}" for group in VARIABLES), *given]
        lines += [f"{PYTHON} -m stages.{stage} {' '.join(map(shlex.quote, whole))}" for stage in ("eval", "report")]
    return "\n".join([*_needed(cfg), *lines])


def _usual(cfg: Config, runs: Sequence[tuple[str, int, Mapping]]) -> bool:
    """Whether the runs are those that `make eval` trains where they are missing, with the settings of now."""
    seeds = cfg.eval.seeds or [cfg.seed]
    if {(arm, seed) for arm, seed, _ in runs} != {(a, s) for a in cfg.eval.arms or USUAL for s in seeds}:
        return False
    return all(_settings_of(overrides(cfg), arm) == _unseeded(settings) for arm, _, settings in runs)


def _settings_of(pairs: Sequence[str], arm: str) -> dict[str, Any]:
    """What an arm is trained with by these overrides."""
    from pipeline import receipts
    from pipeline.train import status

    kept = [o for o in pairs if not o.startswith(("arm=", "arm."))]
    return _unseeded(receipts.plain(status.settings(_composed((*kept, f"arm={arm}")))))


def _unseeded(settings: Mapping) -> dict[str, Any]:
    return {key: value for key, value in _flat(settings) if key != "seed"}


def _suite(cfg: Config, given: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """SUITE and TASKS, by which make also makes the environment of a harness, and the other settings."""
    if f"eval={cfg.eval.name}" not in given:
        return [], list(given)
    variables, tasks = [("SUITE", cfg.eval.name)], cfg.eval.harness_tasks
    if tasks:
        variables.append(("TASKS", ",".join(tasks)))
    return variables, [o for o in given if o.partition("=")[0] not in ("eval", "eval.harness_tasks")]


def _needed(cfg: Config) -> list[str]:
    """What nobody but the reader can tell: where the files of a benchmark lie."""
    if cfg.eval.suite:
        return []
    named = (split.rpartition(":")[0] for splits in cfg.eval.tasks.values() for split in splits)
    return [f'# first: make shard DATA={data} ARGS="data.path=FOLDER"' for data in dict.fromkeys(filter(None, named))]


def _trained(cfg: Config, arm: str, settings: Mapping) -> list[str]:
    """Overrides that lead to the settings of a run's receipt."""
    from pipeline import receipts
    from pipeline.config import choices
    from pipeline.train import status

    pairs = [f"{group}={_choice(cfg, group)}" for group in VARIABLES]
    if arm in choices("arm"):
        pairs.append(f"arm={arm}")
    default = receipts.plain(status.settings(_composed(tuple(_composable(cfg, pairs)))))
    return [
        f"{key}={hydra(value)}"
        for key, value in _flat(settings)
        if key != "seed" and value != dict(_flat(default)).get(key, value)
    ]


def _flat(settings: Mapping, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _line(target: str, variables: Sequence[tuple[str, str]], given: Sequence[str]) -> str:
    words = [f"{name}={shlex.quote(value)}" for name, value in variables]
    if given:
        # make gives ARGS to the shell once more, so each setting is quoted for that one, and `$` doubled for make.
        text = " ".join(map(shlex.quote, given)).replace("$", "$$")
        words.append(f'ARGS="{text}"' if not set(text) & set('"`\\$!') else f"ARGS={shlex.quote(text)}")
    return " ".join(["make", target, *words])


def overrides(cfg: Config) -> list[str]:
    """Hydra overrides that compose these settings: the choices of groups, then every value that differs from them."""
    from pipeline.config import choices

    pairs = [f"{group}={_choice(cfg, group)}" for group in (*VARIABLES, "arm")]
    for group in ("train", "eval", "report"):
        name = getattr(cfg, group).name
        if name in choices(group) and name != getattr(_composed(tuple(_composable(cfg, pairs))), group).name:
            pairs.append(f"{group}={name}")
    whole = _composable(cfg, pairs)
    return [*whole, *_changes(cfg, _composed(tuple(whole)))]


@cache
def _composed(pairs: tuple[str, ...]) -> Config:
    """Settings that nobody changes: composing takes a noticeable part of a second."""
    from pipeline.config import compose

    return compose(pairs)


def _choice(cfg: Config, group: str) -> str:
    """The name of a group's file: data may have been given a name of their own."""
    from pipeline.config import choices

    chosen = getattr(cfg, group)
    return chosen.name if chosen.name in choices(group) else getattr(chosen, "kind", chosen.name)


def _composable(cfg: Config, pairs: Sequence[str]) -> list[str]:
    """The overrides, and the values of settings without which nothing can be composed."""
    from pipeline.errors import UserError

    found = list(pairs)
    while True:
        try:
            _composed(tuple(found))
            return found
        except UserError as error:
            missing = re.match(r"(\S+) has no value: ", str(error))
            if not missing or f"{missing[1]}=" in " ".join(found):
                raise
            found.append(f"{missing[1]}={hydra(dict(_leaves(cfg))[missing[1]])}")


def _changes(cfg: Config, default: Config) -> Iterator[str]:
    before = dict(_leaves(default))
    for key, value in _leaves(cfg):
        if value == before[key]:
            continue
        if isinstance(value, Mapping) and not before[key]:  # a dict that is empty by default takes new keys only
            yield from (f"+{key}.{name}={hydra(one)}" for name, one in value.items())
        else:
            yield f"{key}={hydra(value)}"


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name in vars(node):
        value, here = getattr(node, name), f"{path}{name}"
        if is_dataclass(value):
            yield from _leaves(value, f"{here}.")
        else:
            yield here, value


def hydra(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{hydra(k)}: {hydra(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(hydra, value)) + "]"
    if is_dataclass(value):
        return hydra(asdict(value))
    if not isinstance(value, str):
        return repr(value)
    plain = re.fullmatch(r"[A-Za-z_./~][\w./@~%+-]*(?: [\w./@~%+-]+)*", value)
    plain = plain and value.lower() not in ("true", "false", "null", "nan", "inf")
    if plain:
        return value
    return "'" + value.replace("'", "\\'") + "'"

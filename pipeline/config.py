"""The one configuration of all stages: typed, composed by Hydra from the packaged `conf/`, unknown keys refused.

Every room declares its own dataclass beside its code; this module only joins them. Importing it is cheap (no torch).
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache

from pipeline.align.config import AlignConfig, ArmConfig
from pipeline.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.evaluate.config import EvalConfig
from pipeline.report.config import ReportConfig
from pipeline.sources.config import DataConfig
from pipeline.student.config import ModelConfig
from pipeline.teacher.config import TeacherConfig
from pipeline.train.config import TrainConfig

GROUPS = {
    "data": DataConfig,
    "teacher": TeacherConfig,
    "model": ModelConfig,
    "arm": ArmConfig,
    "align": AlignConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "engine": EngineConfig,
    "report": ReportConfig,
}
SCHEMA = "schema"  # the name under which a group's dataclass is registered; never a choice of the user


@dataclass
class Config:
    """All settings of a run.

    Args:
        seed: the training seed; it never touches shards or maps.
        shards_dir: where the first two stages cache their output.
        runs_dir: where training, evaluation and report write.
        dry_run: print what a stage would do and what it needs, then stop.
        overwrite: let a stage rebuild output that was made with other settings instead of refusing.
    """

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    arm: ArmConfig = field(default_factory=ArmConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 1
    shards_dir: str = "shards"
    runs_dir: str = "runs"
    dry_run: bool = False
    overwrite: bool = False


def compose(overrides: Iterable[str] = ()) -> Config:
    """The configuration for Hydra overrides such as ``["data=easy_vqa", "train.steps=100"]``.

    Raises:
        UserError: unknown group choice or key, a value of the wrong type, or a required value that is not given.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    _check(overrides)
    _register()
    try:
        with initialize_config_module(config_module="conf", version_base="1.3"):
            node = hydra_compose("config", overrides=overrides)
            missing = sorted(OmegaConf.missing_keys(node))
            if missing:
                raise UserError(f"{missing[0]} has no value: give it as {missing[0]}=...")
            return OmegaConf.to_object(node)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except ValueError as error:  # a dataclass that checks its own values
        raise UserError(_first_line(error)) from error


def choices(group: str) -> list[str]:
    """The names that `group=` accepts, sorted."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    _register()
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path("pkg://conf"))
    return sorted(set(loader.get_group_options(group)) - {SCHEMA})


def _check(overrides: list[str]) -> None:
    """Refuses what Hydra would let through: keys beside the schema (`+key=1`), removals and the schema as a choice."""
    for override in overrides:
        key, _, value = override.partition("=")
        if override.startswith("~"):
            raise UserError(f"cannot remove a setting ('{override}'): give it a value instead")
        if override.startswith("+"):
            message = _unknown(key.lstrip("+"))
            if message:
                raise UserError(message)
        if key in GROUPS and value == SCHEMA:
            raise UserError(f"unknown {key} '{value}': choose one of {', '.join(choices(key))}")


@cache
def _register() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=Config)
    for group, schema in GROUPS.items():
        store.store(group=group, name=SCHEMA, node=schema)


def _explain(error: Exception) -> str:
    """One line for the user from an error of Hydra or OmegaConf."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        if group in GROUPS:
            return f"unknown {group} '{name}': choose one of {', '.join(choices(group))}"
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': write settings as name=value"

    # The cause names the key; Hydra's own text recommends an option that would only mislead.
    link: BaseException | None = error
    while link is not None:
        key = getattr(link, "full_key", None)
        if key:
            if "not in struct" in str(link) and not _unknown(key):  # an entry of a dict whose keys are free
                section, _, name = key.rpartition(".")
                return f"{key} is not there yet: add it with +{section}.{name}=... or +{section}={{{name}: ...}}"
            return _unknown(key) or f"{key}: {_first_line(link)}"
        link = link.__cause__ or link.__context__
    quoted = re.search(r"Could not (?:override|append|find)[^']*'([^']+)'", str(error))
    return (quoted and _unknown(quoted.group(1))) or _first_line(error)


def _unknown(key: str) -> str | None:
    """What to tell about a key that the schema lacks: its section's keys and the closest one; None if it is known."""
    node, path = Config, key.split(".")
    for depth, part in enumerate(path):
        known = {f.name: f.type for f in fields(node)}
        if part not in known:
            prefix = ".".join(path[:depth])
            close = difflib.get_close_matches(part, known, n=1)
            hint = f" (did you mean {'.'.join([*path[:depth], close[0]])}?)" if close else ""
            where = f"{prefix} has" if prefix else "there are"
            return f"unknown setting '{key}'{hint}: {where} {', '.join(sorted(known))}"
        if not is_dataclass(known[part]):
            return None  # a value, or a dict whose keys are free
        node = known[part]
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

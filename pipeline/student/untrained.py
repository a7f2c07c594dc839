"""`model.weights=random`: a directory with the student's config and processor, made in place of a download.

With `model.size=tiny` it holds weights too, as published ones would lie, so that loading, export and reloading run the
code that they run for real. With `model.size=full` it holds the published shapes (`shapes`) and a small vocabulary;
the weights are drawn in memory.
"""

import shutil
import tempfile
from dataclasses import replace
from os import environ
from pathlib import Path

from pipeline.errors import UserError
from pipeline.student.config import ModelConfig
from pipeline.student.weights import builders_digest, model_path


def directory(cfg: ModelConfig) -> ModelConfig:
    """The settings that load the student from a directory on this machine, which is made if it is not there.

    Raises:
        UserError: nothing is known about how a model of this kind is built.
    """
    kind = kind_of(cfg)
    folder = cache() / f"{kind}-{cfg.size}-{builders_digest()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _build(kind, cfg.size, partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and made the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    parts = {name: str(folder / name) for name in cfg.parts if (folder / name).is_dir()}
    path = folder / "model" if parts else folder
    return replace(cfg, path=str(path), parts=parts, revision="", local_files_only=True)


def cache() -> Path:
    """Where such directories are kept: a few hundred kilobytes each, safe to delete."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavender-pipeline" / "random"


def kind_of(cfg: ModelConfig) -> str:
    """The kind of the model: its name where one architecture has several shapes, else its `model_type`.

    Raises:
        UserError: there is none of the size that is asked for.
    """
    from pipeline.student.load import find_family
    from pipeline.student.shapes import SHAPES
    from pipeline.student.tiny import KINDS

    if cfg.size == "full":
        if cfg.name not in SHAPES:
            raise UserError(
                f"no published shapes of '{cfg.name}' in this package (there are {', '.join(SHAPES)}): "
                "give model.size=tiny"
            )
        return cfg.name
    if not cfg.family:
        find_family(cfg, model_path(cfg.path))
    kind = cfg.name if cfg.name in KINDS else cfg.family or "mllama"
    if kind not in KINDS:
        raise UserError(f"no tiny model for model.family={cfg.family} ({cfg.name}): there are {', '.join(KINDS)}")
    return kind


def _build(kind: str, size: str, folder: Path) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        if size == "full":
            from pipeline.student.shapes import write

            write(kind, folder)
        else:
            from pipeline.student.tiny import build_student

            build_student(kind, folder)

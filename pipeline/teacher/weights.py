"""Where a teacher's weights are on this machine, and a digest that names them. No torch here: `status` uses it too."""

import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.teacher.config import TeacherConfig
from pipeline.weights import directory_digest

BUNDLED = Path(__file__).parent.parent / "world" / "models"
INDEX = "model_index.json"
# What a teacher reads. Pickled weights are never asked for, nor are other precisions than the main one.
WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
UNWANTED = ["*.fp16*", "*.non_ema*", "safety_checker/*", "feature_extractor/*"]


def locate(cfg: TeacherConfig) -> Path:
    """The directory with the pipeline's `model_index.json` and its components.

    Raises:
        UserError: neither a bundled model, a directory nor a hub id whose files are here (or may be downloaded).
    """
    if cfg.path.startswith("bundled:"):
        path = BUNDLED / cfg.path.removeprefix("bundled:")
        if not (path / INDEX).is_file():
            raise UserError(f"teacher.path={cfg.path}: this installation has no such model in {BUNDLED}")
        return path
    path = Path(cfg.path).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise UserError(f"teacher.path={cfg.path} has no {INDEX}: give the directory of a diffusers pipeline")
        return path
    if cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") != 1:
        raise UserError(f"teacher.path={cfg.path}: no such directory, and not a hub id of the form owner/name")
    return _from_hub(cfg)


def read_index(directory: Path) -> dict:
    """The pipeline's `model_index.json`.

    Raises:
        UserError: it is not valid JSON.
    """
    file = directory / INDEX
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def _from_hub(cfg: TeacherConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            cfg.path,
            revision=cfg.revision or None,
            local_files_only=cfg.local_files_only,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except LocalEntryNotFoundError as error:
        cure = (
            f"run `hf download {cfg.path}`, or allow the download with teacher.local_files_only=false"
            if cfg.local_files_only
            else f"and the hub cannot be reached: run `hf download {cfg.path}` where it can, and copy its cache here"
        )
        said = ":" if cfg.local_files_only else ","
        raise UserError(f"the weights of teacher '{cfg.path}' are not on this machine{said} {cure}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"teacher '{cfg.path}' cannot be fetched: {str(error).splitlines()[0]}") from error
    path = Path(found)
    if not (path / INDEX).is_file():
        raise UserError(
            f"the weights of teacher '{cfg.path}' are incomplete on this machine: run `hf download {cfg.path}`"
        )
    return path


def check(cfg: TeacherConfig) -> None:
    """Refuses early, before an earlier stage runs, what cannot be loaded later. A hub id that may be downloaded passes.

    Raises:
        UserError: as `locate` and `read_index`, or a component has no weights.
    """
    if not cfg.local_files_only and not cfg.path.startswith("bundled:") and not Path(cfg.path).expanduser().is_dir():
        return
    directory = locate(cfg)
    for name in read_index(directory):
        # of a pipeline's parts only the networks have a plain config.json
        if (directory / name / "config.json").is_file() and name != "safety_checker":
            require_weights(directory / name)


def require_weights(component: Path) -> None:
    """Raises UserError: the folder of a component holds no *.safetensors."""
    if not any(component.glob("*.safetensors")):
        raise UserError(f"teacher component {component} has no weights (*.safetensors)")


def digest(path: Path) -> str:
    """Names the content of a pipeline directory: its components' configs, vocabularies and weights."""
    index = read_index(path)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    return directory_digest(path, [file for part in parts for file in (path / part).rglob("*")])

"""Where a student's files are, and a digest that names them. No torch here: the light status checks use it too."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from pipeline.errors import UserError
from pipeline.student.config import ModelConfig
from pipeline.weights import directory_digest

WEIGHTS = (".safetensors", ".bin", ".pt")
BUNDLED = Path(__file__).parent.parent / "world" / "models"


def model_path(path: str) -> str:
    """The directory of a ``bundled:<name>`` model, any other path as it is."""
    return str(BUNDLED / path.removeprefix("bundled:")) if path.startswith("bundled:") else path


def identity(cfg: ModelConfig) -> str:
    """Names the content of a student: configs, tokenizer and weights; for a hub id that is not here yet, the id.

    With the parts that it is put together from, if there are any.

    Raises:
        UserError: the directory does not exist.
    """
    if cfg.weights == "random":
        return f"random {cfg.size} {cfg.name} {builders_digest()}"
    found = [_content(cfg)]
    for name in sorted(cfg.parts):
        found.append(f"{name} {_content(replace(cfg, path=cfg.parts[name], revision=''))}")
    return ", ".join(found)


@cache
def builders_digest() -> str:
    """Names the code that makes students with random weights: another version of it makes others."""
    files = sorted((Path(__file__).parent / "tiny").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def check(cfg: ModelConfig) -> None:
    """Refuses early, before an earlier stage runs, what cannot be loaded later. A hub id that may be downloaded passes.

    Raises:
        UserError: no such directory, nothing that holds weights in it, or a hub id whose files are not on this machine.
    """
    if cfg.weights == "random":
        return
    for part in (cfg, *(replace(cfg, path=path, revision="") for path in cfg.parts.values())):
        path = Path(model_path(part.path)).expanduser()
        if path.is_dir():
            if not cfg.family and part is cfg and not (path / "config.json").is_file():
                raise UserError(f"{cfg.path} has no config.json: it is not a model directory")
            if not any(file.suffix in WEIGHTS for file in path.iterdir()):
                raise UserError(f"the model directory {part.path} has no weights ({', '.join(WEIGHTS)})")
        elif "@" in _content(part) and cfg.local_files_only:
            raise UserError(
                f"the weights of model '{part.path}' are not on this machine: run `hf download {part.path}`, or allow "
                "the download with model.local_files_only=false"
            )


def _content(cfg: ModelConfig) -> str:
    path = Path(model_path(cfg.path)).expanduser()
    if path.is_dir():
        return directory_digest(path)
    if cfg.path.startswith(("bundled:", ".", "/", "~")) or cfg.path.count("/") != 1:
        raise UserError(f"no model directory {path}: give model.path= a directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(cfg.path, revision=cfg.revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return f"{cfg.path}@{cfg.revision or 'main'}"
    return directory_digest(found)

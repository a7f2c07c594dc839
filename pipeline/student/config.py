"""Settings of the student: which vision-language model, and how it is loaded."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager")
WEIGHTS = ("published", "random")
SIZES = ("full", "tiny")


@dataclass
class ModelConfig:
    """One student.

    Args:
        name: names the folder of its runs, `runs/<name>/`.
        path: a directory in the layout of transformers, a hub id, or `bundled:<name>` for one shipped with the package.
        family: the module that knows the architecture; empty reads it from the model's own config.
        revision: branch, tag or commit of a hub id; empty for its default branch.
        local_files_only: never download; false fetches missing weights from the hub.
        dtype: precision of the weights.
        attention: attention kernel of the model without the tap: `sdpa` or `eager`.
        trust_remote_code: let transformers run Python code that comes with the weights.
        parts: where further parts of the model are, by name, for a checkpoint that holds only what was trained
            (OpenFlamingo: `language` and `vision`).
        weights: `published` loads them; `random` draws them and downloads nothing, for tests and benchmarks.
        size: of a model with random weights: `full` has the published shapes, `tiny` runs anywhere in seconds.
        max_length: longest sequence in tokens; longer conversations lose their end, never their image.
        max_pixels: larger images are shrunk to so many pixels before the processor sees them; 0 for no limit.
    """

    name: str = MISSING
    path: str = MISSING
    family: str = ""
    revision: str = ""
    local_files_only: bool = True
    dtype: str = "float32"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    weights: str = "published"
    size: str = "full"
    max_length: int = 4096
    max_pixels: int = 0

    def __post_init__(self) -> None:
        for key, known in (("dtype", DTYPES), ("attention", ATTENTION), ("weights", WEIGHTS), ("size", SIZES)):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"unknown model.{key} '{value}': choose one of {', '.join(known)}")
        if self.size == "tiny" and self.weights != "random":
            raise UserError("model.size=tiny has no published weights: give model.weights=random with it")
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}: give at least 1")
        if self.max_pixels < 0:
            raise UserError(f"model.max_pixels is {self.max_pixels}: give 0 or more")

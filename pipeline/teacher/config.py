"""Settings of the teacher: which diffusion model reads the pictures, and how its attention becomes word maps."""

import math
import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.errors import UserError

MAP_SIDE = 32  # cells on a side of every stored map, whatever the model's own grids
TEXTS = ("question+answer", "answer")
PHRASES = ("none", "phrase", "clause", "mean", "product")
UNITS = ("word", "token")
GEOMETRIES = ("squash", "bucket")
INVERSIONS = ("none", "ddim", "null-text")
PROFILES = ("exact", "compact")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class TeacherConfig:
    """One teacher and its way of reading attention.

    Args:
        name: names the folder of its maps, `shards/<data>/maps/<name>`.
        path: a directory in the layout of diffusers, a hub id, or `bundled:<name>` for a model shipped in the package.
        revision: branch, tag or commit of a hub id; empty for its default branch.
        local_files_only: never download; false fetches missing weights from the hub.
        dtype: precision of the forward pass; attention is summed in float32 in any case.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        splits: the splits that get maps.
        seed: seeds the noise together with each image's content; the training seed has no part in it.
        text: what one assistant turn is conditioned on: `question+answer` or `answer`.
        unit: a map per `word` or per teacher `token`.
        geometry: `squash` the whole image to the model's square, or `bucket`: keep its aspect ratio.
        image_size: side in pixels of the square; 0 takes the model's own.
        timesteps: training timesteps (0 to 999) at which the noised image is read; several are averaged. Models of
            rectified flow read at the share timestep/1000 of noise. With an inversion: the steps nearest to these, and
            every step if the list is empty.
        draws: noise draws per timestep, averaged.
        inversion: where the noised image comes from: drawn noise (`none`), DDIM inversion (`ddim`), or DDIM inversion
            followed by guided denoising with optimised null text (`null-text`), read on the way back.
        inversion_steps: steps of the inversion over all timesteps.
        guidance: scale of the guided denoising of `null-text`.
        inner_steps: most optimisation steps per denoising step of `null-text`.
        resolutions: sides of the attention grids to use (at the model's own image size); empty uses all layers alike.
        resolution_weights: a weight for each of `resolutions`, shared by its layers; empty weighs them equally.
        layers: regular expression that a layer's name must contain, e.g. `^up_blocks`; empty takes every layer.
        renormalise: divide each layer's map by its sum over the content tokens, so that the start token takes nothing.
        refine: times that the maps are carried along the self-attention (0 for none).
        refine_resolution: side of the self-attention grids used by `refine`; 0 takes the finest of the used blocks.
        phrases: whose map a modifier gets: its own (`none`), that of the noun after it in its phrase (`phrase`), or
            also of the noun it is said of, in its sentence or in the question (`clause`). With `mean` a noun and all
            that is said of it share the mean of their maps, with `product` the geometric mean of the maps scaled to
            [0, 1], which is high where all of the words hold.
        batch_size: windows per forward. It belongs to the fingerprint: another size moves the last bits.
        threads: CPU threads of one forward, for the same reason.
        profile: of the stored maps: `exact` (256 levels) or `compact` (16 levels, half the size).
        compile: compile the model with torch.compile; for long runs on a GPU.
    """

    name: str = MISSING
    path: str = MISSING
    revision: str = ""
    local_files_only: bool = True
    dtype: str = "float32"
    device: str = "auto"
    splits: list[str] = field(default_factory=lambda: ["train"])
    seed: int = 0
    text: str = "question+answer"
    unit: str = "word"
    geometry: str = "squash"
    image_size: int = 0
    timesteps: list[int] = field(default_factory=lambda: [100])
    draws: int = 1
    inversion: str = "none"
    inversion_steps: int = 50
    guidance: float = 7.5
    inner_steps: int = 10
    resolutions: list[int] = field(default_factory=list)
    resolution_weights: list[float] = field(default_factory=list)
    layers: str = ""
    renormalise: bool = False
    refine: int = 0
    refine_resolution: int = 0
    phrases: str = "none"
    batch_size: int = 16
    threads: int = 1
    profile: str = "exact"
    compile: bool = False

    def __post_init__(self) -> None:
        for key, value, known in (
            ("text", self.text, TEXTS),
            ("phrases", self.phrases, PHRASES),
            ("unit", self.unit, UNITS),
            ("geometry", self.geometry, GEOMETRIES),
            ("inversion", self.inversion, INVERSIONS),
            ("profile", self.profile, PROFILES),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, ("auto", "cpu", "cuda")),
        ):
            if value not in known:
                raise UserError(f"unknown teacher.{key} '{value}': choose one of {', '.join(known)}")
        if any(not 0 <= t < 1000 for t in self.timesteps) or not (self.timesteps or self.inversion != "none"):
            raise UserError(f"teacher.timesteps is {self.timesteps}: give at least one, each from 0 to 999")
        least = {"draws": 1, "batch_size": 1, "threads": 1, "refine": 0, "inner_steps": 1, "image_size": 0}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise UserError(f"teacher.{key} is {getattr(self, key)}: give at least {value}")
        if not 2 <= self.inversion_steps <= 1000:
            raise UserError(f"teacher.inversion_steps is {self.inversion_steps}: give 2 to 1000")
        if self.inversion != "none" and self.draws > 1:
            raise UserError(f"teacher.draws is {self.draws}: an inversion draws no noise, so give 1")
        if len(set(self.resolutions)) < len(self.resolutions):
            raise UserError(f"teacher.resolutions is {self.resolutions}: give each once")
        if self.resolution_weights and len(self.resolution_weights) != len(self.resolutions):
            raise UserError(
                f"teacher.resolution_weights has {len(self.resolution_weights)} values for "
                f"{len(self.resolutions)} teacher.resolutions: give one for each, or none"
            )
        if any(not 0 <= weight < math.inf for weight in self.resolution_weights) or (
            self.resolution_weights and not sum(self.resolution_weights)
        ):
            raise UserError(
                f"teacher.resolution_weights is {self.resolution_weights}: give none below 0 and one or more above"
            )
        if not math.isfinite(self.guidance):
            raise UserError(f"teacher.guidance is {self.guidance}: give a finite number")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise UserError(f"teacher.splits is {self.splits}: give one or more, each once")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise UserError(f"teacher.layers is no regular expression: {error}") from error

    @property
    def forwards(self) -> int:
        """Forwards of the diffusion model per window of text (for `null-text` the most it may take)."""
        if self.inversion == "none":
            return len(self.timesteps) * self.draws
        wanted = nearest_steps(inversion_steps(self.inversion_steps), self.timesteps)
        if self.inversion == "ddim":
            return max(wanted) + 1 + len(wanted)
        # Out to the noise, and back to the last step that is read: the text, the null text, its optimisation.
        return self.inversion_steps + (self.inversion_steps - 1 - min(wanted)) * (2 + self.inner_steps) + 1


def inversion_steps(count: int, total: int = 1000) -> list[int]:
    """The training timesteps of a deterministic sampler of `count` steps, ascending, as published schedulers take
    them: the last step back to the image does not start at zero noise."""
    stride = total // count
    first = 1 if stride > 1 else 0
    return [first + number * stride for number in range(count)]


def nearest_steps(steps: list[int], timesteps: list[int]) -> set[int]:
    """Numbers of the steps nearest to these timesteps; all of them for none."""
    if not timesteps:
        return set(range(len(steps)))
    return {min(range(len(steps)), key=lambda i: abs(steps[i] - t)) for t in timesteps}

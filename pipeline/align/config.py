"""Settings of the alignment loss and of the arms of a comparison."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from pipeline.align.words import KINDS, kinds
from pipeline.errors import UserError

ALIGNERS = ("light", "sim", "deep", "none")
ROWS = ("predict", "token")
ROLES = ("user", "assistant")
WORDS = ("content", "all")
SIDES = (32, 16, 8)
ATTENTION = ("model", "learned")
SCHEDULES = ("constant", "decay", "inverse", "warmup")
AGGREGATIONS = ("per-layer", "mean", "max", "flow")
MEASURES = ("mse", "kl")
TARGETS = ("teacher", "shuffled", "centre", "oracle")


@dataclass
class AlignConfig:
    """How the student's attention is compared with the maps.

    Args:
        lam: lambda, the weight of the alignment loss beside the language loss, for every arm that aligns.
        aligner: size of the small network between the two: `light`, `sim` or `deep` (2, 3 or 5 wide convolutions);
            `none` compares the mean over heads itself.
        hidden: its channels.
        rows: where a word's attention is read: at the positions that predict its tokens (`predict`) or at the tokens
            themselves (`token`).
        roles: whose words are aligned.
        attention: `model` reads the student's own attention; `learned` that of new projections beside it, which serve
            the alignment only, in models that have the image's tokens among the text.
        aggregation: `per-layer` aligns each layer and takes the mean, `mean` takes the mean over layers first, `max`
            the maximum over layers and heads, `flow` the product through the layers, head by head.
        measure: `mse` compares maps scaled to [0, 1]; `kl` compares them as distributions over the image.
        sharpen: maps are raised to this power before they are compared, which takes the weight off their faint parts; 1
            leaves them as they are.
        layers: indices of the text layers to use; empty uses every layer that looks at the image.
        last_layers: use only so many of them, the last ones; 0 for all.
        words: `content` leaves out words that can name nothing visible (articles, prepositions, ...), `all` does not;
            `nouns`, `verbs`, `adjectives` or several of them joined by hyphens (`nouns-verbs`) keep only those content
            words, with an optional tagger (English; `pip install 'lavender-pipeline[tagger]'` and its data).
        max_words: words aligned per example, the first ones; 0 for no limit.
        side: cells on a side of the maps that are compared. The stored ones have 32; fewer cost less, and lose nothing
            where neither model resolves more.
        schedule: course of lambda over the run: `constant`, `decay` (exponential), `inverse` (grows as `decay` falls)
            or `warmup` (linear from 0).
        decay: `decay` divides lambda by e this many times over the run.
        warmup: share of the run over which `warmup` grows.
        aligner_first: share of the run, at its start, in which the language loss counts for next to nothing.
        paper_compat: repeat the released code's way from attention to map, its mistakes included: image tokens as one
            vector, stretched to a square, whatever their true places. For comparison only.
    """

    lam: float = 5.0
    aligner: str = "sim"
    hidden: int = 32
    rows: str = "predict"
    roles: list[str] = field(default_factory=lambda: ["assistant"])
    attention: str = "model"
    aggregation: str = "per-layer"
    measure: str = "mse"
    sharpen: float = 1.0
    layers: list[int] = field(default_factory=list)
    last_layers: int = 0
    words: str = "content"
    max_words: int = 30
    side: int = 32
    schedule: str = "constant"
    decay: float = 3.0
    warmup: float = 0.1
    aligner_first: float = 0.0
    paper_compat: bool = False

    def __post_init__(self) -> None:
        for key, value, known in (
            ("aligner", self.aligner, ALIGNERS),
            ("rows", self.rows, ROWS),
            ("attention", self.attention, ATTENTION),
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("measure", self.measure, MEASURES),
            ("side", self.side, SIDES),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                raise UserError(f"unknown align.{key} '{value}': choose one of {', '.join(map(str, known))}")
        if self.words not in WORDS and not kinds(self.words):
            known = ", ".join((*WORDS, *KINDS))
            raise UserError(
                f"unknown align.words '{self.words}': choose one of {known}, the last ones joined by hyphens"
            )
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise UserError(f"align.roles is {list(self.roles)}: give some of {', '.join(ROLES)}")
        if not 0 < self.sharpen < math.inf:
            raise UserError(f"align.sharpen is {self.sharpen}: give a power above 0 (1 leaves the maps as they are)")
        if self.hidden < 1:
            raise UserError(f"align.hidden is {self.hidden}: give at least 1")
        if self.max_words < 0:
            raise UserError(f"align.max_words is {self.max_words}: give 0 (no limit) or more")
        if self.last_layers < 0:
            raise UserError(f"align.last_layers is {self.last_layers}: give 0 (all) or more")
        if not 0 <= self.aligner_first <= 1:
            raise UserError(f"align.aligner_first is {self.aligner_first}: give a share of the run, 0 to 1")
        if self.paper_compat and (self.aggregation, self.measure, self.side) != ("per-layer", "mse", 32):
            raise UserError("align.paper_compat goes with aggregation=per-layer, measure=mse and side=32 only")
        if self.paper_compat and self.attention != "model":
            raise UserError("align.paper_compat reads the student's own attention: align.attention=model")
        if not 0 < self.warmup <= 1:
            raise UserError(f"align.warmup is {self.warmup}: give a share of the run above 0, at most 1")


@dataclass
class ArmConfig:
    """One training variant of a comparison; all arms share every line of code.

    Args:
        name: names the run, `runs/<model>/<data>/<name>-<seed>`.
        lam: weight of the alignment loss beside the language loss, commonly `${align.lam}`; 0 trains on language only.
        targets: what the attention is pulled to: the teacher's maps, another image's maps (`shuffled`), a fixed blob
            in the middle (`centre`) or the true regions where they are known (`oracle`).
    """

    name: str = MISSING
    lam: float = 0.0
    targets: str = "teacher"

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise UserError(f"unknown arm.targets '{self.targets}': choose one of {', '.join(TARGETS)}")
        if not self.lam >= 0:
            raise UserError(f"arm.lam is {self.lam}: give 0 or more")

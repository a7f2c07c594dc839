"""Settings of the train stage."""

import math
import re
from dataclasses import dataclass, field

YEAR = 365 * 86400  # in seconds


@dataclass
class LoraConfig:
    """Low-rank adapters (PEFT).

    Args:
        r, alpha, dropout: rank, scale and dropout.
        targets: names of the modules that get one, the last parts of their full names.
        vision: true adds the attention of the vision part whatever its projections are called, false leaves the vision
            part out; by default it is adapted where the names in ``targets`` occur in it.
    """

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    vision: bool | None = None


@dataclass
class Unfreeze:
    """Parameters whose names match ``pattern`` (a regular expression, at any place) are trained from ``step`` on."""

    step: int = 0
    pattern: str = ""


@dataclass
class Quality:
    """Which of a teacher's maps are worth aligning to; the defaults keep all.

    Args:
        min_peak: least share of a map's attention in its strongest cell, in units of the even share: 1 is a flat map,
            1024 all in one cell.
        max_entropy: largest entropy of a map, as a share of that of a flat one (1).
    """

    min_peak: float = 0.0
    max_entropy: float = 1.0


@dataclass
class TrainConfig:
    """How a student is fine-tuned.

    Args:
        split: the split that is trained on.
        method: ``lora`` trains adapters, ``full`` every weight that ``freeze`` does not hold.
        export: what ``lora`` leaves: an ``adapter`` for the base, or a whole model with it ``merged``.
        freeze: regular expressions over parameter names; a match at any place is not trained.
        unfreeze: what is trained only from some step on, a list of {step, pattern}.
        quantize: ``nf4`` holds what is not trained in 4 bits (QLoRA; needs bitsandbytes and a CUDA GPU).
        steps: optimizer steps; 0 means ``epochs`` decide.
        batch_size: examples per optimizer step over all processes; ``micro_batch`` of them at a time in each.
        lr: peak learning rate, after a linear warm-up over ``warmup`` (share of the steps), then ``schedule``.
        aligner_lr: of the Aligner, whose weights start from scratch.
        precision: ``no`` or ``bf16`` compute.
        launch: how `make train` starts it: ``one`` process, ``torchrun`` over all GPUs here, ``slurm`` (a job with
            the resources of ``engine`` on each of ``nodes`` nodes), or ``auto``: torchrun where there are several.
        processes: on each machine; 0 takes one per GPU.
        nodes: machines, for ``slurm``.
        parallel: how several processes share a step: ``ddp`` (each has all weights), ``fsdp`` (FSDP2, weights are
            sharded), or ``auto``: ``fsdp`` on GPUs, ``ddp`` without.
        cpu_offload: with ``fsdp``, keep weights and optimizer in the CPU's memory.
        compile: compile the student's layers one by one (torch.compile).
        logits_mb: MiB of float32 logits computed at once; where a micro-batch has more, in chunks.
        on_nonfinite: when a loss or gradient is NaN or infinite, `stop` with the keys of the batch, or `skip` the step,
            count it, and stop after ten in a row.
        hang_timeout: seconds after which a step that has not ended shows where every thread is; 0 never.
        checkpoint_every: steps between checkpoints to resume from; the last ``keep_checkpoints`` are kept, and the one
            with the lowest held-out loss.
        held_out: examples that are evaluated during training. They are taken out of ``split``, drawn by a hash of their
            images, at most a tenth of it, and never trained on; or they are of ``held_out_split``, where it is given.
        held_out_split: a split of the data that is not trained on, such as `val`.
        evaluate_every: steps between evaluations of the held-out examples; 0 never evaluates. They change nothing of
            what is trained. With it the first and the last step are evaluated too.
        overlays: so many of the held-out examples, always the same, are drawn with the target's and the student's
            attention at every evaluation.
        choose: the weights that are exported: those of the `last` step, or of the checkpoint that is `best` on the
            held-out examples.
        trackers: what shows the numbers besides `metrics.jsonl`: some of `tensorboard`, `wandb` and `trackio`.
        window: shards that are shuffled together; 0 takes all.
        window_mb: of them, no more than fit into so many MiB with their decoded maps (but one at least).
        weights: share of each part of a mixture (``data.parts``) in what is trained on, by name
            (``+train.weights={a: 1, b: 2}``); all parts must be named, and 0 leaves one out. Without them each example
            comes once an epoch.
        bucket: batches of examples of similar length, in shuffled order.
        max_tokens: of a global batch, padding included: the longest example times their number; 0 sets no limit. An
            example that is longer makes a batch of its own.
        quality: words whose maps say too little are not aligned.
        workers: processes or threads that prepare batches; 0 prepares them in the loop.
        max_steps_per_call: stop after so many steps and leave a checkpoint (0: run to the end); for preemptible jobs.
    """

    name: str = "default"
    split: str = "train"
    method: str = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    export: str = "adapter"
    freeze: list[str] = field(default_factory=list)
    unfreeze: list[Unfreeze] = field(default_factory=list)
    quantize: str = ""
    steps: int = 0
    epochs: float = 3.0
    batch_size: int = 32
    micro_batch: int = 4
    lr: float = 1e-4
    aligner_lr: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    grad_clip: float = 1.0
    warmup: float = 0.03
    schedule: str = "cosine"
    precision: str = "no"
    gradient_checkpointing: bool = False
    launch: str = "auto"
    processes: int = 0
    nodes: int = 1
    parallel: str = "auto"
    cpu_offload: bool = False
    compile: bool = False
    logits_mb: int = 256
    on_nonfinite: str = "stop"
    hang_timeout: float = 1800.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    held_out: int = 0
    held_out_split: str = ""
    evaluate_every: int = 0
    overlays: int = 8
    choose: str = "last"
    log_every: int = 10
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    window: int = 4
    window_mb: int = 1024
    weights: dict[str, float] = field(default_factory=dict)
    bucket: bool = False
    max_tokens: int = 0
    quality: Quality = field(default_factory=Quality)
    workers: int = 1
    max_steps_per_call: int = 0

    @property
    def by_length(self) -> bool:
        """Whether the lengths of examples decide which are trained on together."""
        return self.bucket or self.max_tokens > 0

    def __post_init__(self) -> None:
        self._check_order()
        self._check_numbers()
        self._check_patterns()
        if self.method not in ("lora", "full"):
            raise ValueError(f"train.method={self.method}: choose lora or full")
        if self.export not in ("adapter", "merged"):
            raise ValueError(f"train.export={self.export}: choose adapter or merged")
        if self.quantize not in ("", "nf4"):
            raise ValueError(f"train.quantize={self.quantize}: choose nf4, or leave it empty")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"train.schedule={self.schedule}: choose cosine, linear or constant")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"train.precision={self.precision}: choose no or bf16")
        if self.launch not in ("auto", "one", "torchrun", "slurm"):
            raise ValueError(f"train.launch={self.launch}: choose auto, one, torchrun or slurm")
        if self.nodes < 1 or self.processes < 0:
            raise ValueError("train.nodes must be 1 or more and train.processes 0 or more")
        if self.parallel not in ("auto", "ddp", "fsdp"):
            raise ValueError(f"train.parallel={self.parallel}: choose auto, ddp or fsdp")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"train.on_nonfinite={self.on_nonfinite}: choose stop or skip")
        for name in ("held_out", "evaluate_every", "overlays"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if self.held_out_split and self.held_out_split == self.split:
            raise ValueError(f"train.held_out_split={self.split} is trained on: name another split, or leave it empty")
        if self.evaluate_every and not self.held_out:
            raise ValueError(f"train.evaluate_every={self.evaluate_every} needs examples: give train.held_out")
        if self.choose not in ("last", "best"):
            raise ValueError(f"train.choose={self.choose}: choose last or best")
        if self.choose == "best" and (not self.evaluate_every or self.checkpoint_every % self.evaluate_every):
            raise ValueError(
                "train.choose=best knows the loss of checkpoints that are evaluated: give train.checkpoint_every and "
                "train.evaluate_every with the first a multiple of the second"
            )
        if not 0 <= self.hang_timeout <= YEAR:
            raise ValueError(f"train.hang_timeout={self.hang_timeout:g}: give seconds, or 0 to watch nothing")
        if self.steps == 0 and self.epochs == 0:
            raise ValueError("train.steps and train.epochs are both 0: give one of them")
        for name in ("batch_size", "micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "logits_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")

    def _check_numbers(self) -> None:
        """What the optimizer would not refuse, or only after the model is loaded."""
        for name in ("lr", "aligner_lr", "weight_decay", "epochs", "steps", "workers", "max_steps_per_call"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if not self.grad_clip > 0:  # 0 would make every gradient 0
            raise ValueError(f"train.grad_clip={self.grad_clip:g}: must be above 0 (inf never clips)")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"train.warmup={self.warmup:g}: give a share of the steps, 0 to 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: give two numbers from 0 to below 1")
        if self.lora.r < 1 or not self.lora.alpha > 0:
            raise ValueError("train.lora.r and train.lora.alpha must be 1 or more")
        if not 0 <= self.lora.dropout < 1:
            raise ValueError(f"train.lora.dropout={self.lora.dropout:g}: give 0 to below 1")

    def _check_patterns(self) -> None:
        for name, pattern in [
            *(("freeze", pattern) for pattern in self.freeze),
            *(("unfreeze", entry.pattern) for entry in self.unfreeze),
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"train.{name}: '{pattern}' is no regular expression: {error}") from error
        for entry in self.unfreeze:
            if entry.step < 0 or not entry.pattern:
                raise ValueError("train.unfreeze: give each a pattern, and a step of 0 or more")

    def _check_order(self) -> None:
        if self.window < 0 or self.window_mb < 1:
            raise ValueError("train.window must be 0 (all shards) or more and train.window_mb 1 or more")
        if self.max_tokens < 0:
            raise ValueError(f"train.max_tokens={self.max_tokens}: give tokens, or 0 for no limit")
        bad = [name for name, weight in self.weights.items() if not 0 <= weight < math.inf]
        if bad:
            raise ValueError(f"train.weights.{bad[0]}={self.weights[bad[0]]:g}: give 0 (leaves it out) or more")
        if self.weights and not any(self.weights.values()):
            raise ValueError("train.weights: all of them are 0, nothing would be trained on")
        if not 0 <= self.quality.min_peak <= 1024:
            raise ValueError(f"train.quality.min_peak={self.quality.min_peak:g}: give 0 (keeps all) to 1024")
        if not 0 < self.quality.max_entropy <= 1:
            raise ValueError(f"train.quality.max_entropy={self.quality.max_entropy:g}: give up to 1 (keeps all)")

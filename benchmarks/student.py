"""What alignment costs a training step, beside the plain step and beside the authors' way.

    python -m benchmarks.student [--families mllama,qwen2_5_vl] [--pairs 5] [--keep DIRECTORY] [--json FILE]

Models of the real width, cut in depth, with random weights: `mllama` is Llama-3.2-11B-Vision with 5 of its 40 text
layers, one of which attends to the 6,404 keys of four image tiles (8 in 40), and `qwen2_5_vl` is Qwen2.5-VL-7B with 2
of its 28 layers and the 391 tokens of a picture of 640x480 pixels among the text. Vision towers and vocabularies are
cut likewise. One example of about 128 text tokens, bfloat16, LoRA as in the paper's code, AdamW. The image's features
are computed once and given to all arms; the whole step, vision tower included, is timed once.

Arms, which take turns in one process on one model:

- `plain`: language loss only, fused attention, no tap;
- `ours`: the same step with the tap and the alignment loss;
- `eager`: the way of the code released with the paper, step by step (`benchmarks.released`): eager attention with
  `output_attentions`, every layer's maps kept, folded, resized and sent through the Aligner for every text position,
  taken apart token by token and word by word in Python;
- `batched` (with `--batched`): the same without its copies and loops, all text positions at once by this project's own
  functions for `paper-compat`: the least that its idea costs.

A ratio of times is the median over pairs of neighbouring steps; its interval is that of the order statistics (with five
pairs the lowest and the highest: 94%). Memory is the peak of a process of its own for each arm above what it holds
between two steps: weights and optimizer state. Both are measured with and without gradient checkpointing; the keys
without a suffix are the worse of the two. On one thread time is processor time, which other programs disturb less.

A quiet core needs about ten minutes for both families. With ``--keep`` each part's numbers are kept as soon as they are
there, and a run that was stopped goes on from them.
"""

import argparse
import ctypes
import gc
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from benchmarks import released
from pipeline.align.aligner import Aligner
from pipeline.align.config import AlignConfig
from pipeline.align.loss import AlignmentLoss, min_max
from pipeline.align.released import folded_image, folded_tiles
from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED, StudentBatch
from pipeline.student.capture import NAME, AttentionTap
from pipeline.student.family import Family
from pipeline.world.student import TEMPLATE, build_tokenizer

ARMS = ("plain", "ours", "eager")
EAGER = ("eager", "batched")
SETTINGS = ("stored", "checkpointed")
FAMILIES = ("mllama", "qwen2_5_vl")
QUESTION = "What is going on in this picture? Answer in some detail."
ANSWER = """A man in a red jacket rides a brown horse along the beach while two black dogs run behind him through the
shallow water. On the left a woman with a yellow umbrella watches them from a wooden chair, and a small child beside her
builds a castle of wet sand with a green bucket. Three white boats lie on the blue sea, their sails catch the wind, and
far behind them grey clouds hang over the hills. A fishing net dries on a fence next to a stone hut whose door stands
open.""".replace("\n", " ")
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{- part['text'] | trim }}{% endif %}{% endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)


def llama(size: str, align: AlignConfig) -> tuple[torch.nn.Module, Family, tuple[int, int]]:
    """Llama-3.2-11B-Vision with an eighth of its depth and vocabulary, its family, and the size of an image of four
    full tiles; or the same, tiny."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import (
        MllamaImageProcessorPil,
        get_all_supported_aspect_ratios,
    )

    from pipeline.student.mllama import Mllama

    real = size == "real"
    tokenizer = build_tokenizer([QUESTION, ANSWER] * 4, 560)
    tile = 560 if real else 56
    processor = MllamaProcessor(
        MllamaImageProcessorPil(size={"height": tile, "width": tile}, max_image_tiles=4),
        tokenizer,
        chat_template=TEMPLATE,
    )
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    config = MllamaConfig(
        text_config={
            "vocab_size": 128256 // 8 if real else image_id,
            "hidden_size": 4096 if real else 64,
            "intermediate_size": 14336 if real else 128,
            "num_hidden_layers": 5,
            "cross_attention_layers": [3],
            "num_attention_heads": 32 if real else 4,
            "num_key_value_heads": 8 if real else 2,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 1280 if real else 32,
            "intermediate_size": 5120 if real else 64,
            "attention_heads": 16 if real else 2,
            "num_hidden_layers": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1, 2, 3],
            "vision_output_dim": (1280 if real else 32) * 5,
            "image_size": tile,
            "patch_size": 14,
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(4)],
        },
        image_token_index=image_id,
    )
    model = random_weights(MllamaForConditionalGeneration, config, real)
    return model, Mllama(processor, align=align), (2 * tile, 2 * tile)


def qwen(size: str, align: AlignConfig) -> tuple[torch.nn.Module, Family, tuple[int, int]]:
    """Qwen2.5-VL-7B with a fourteenth of its depth and vocabulary, its family, and the size of an image of 391 tokens;
    or the same, tiny."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from pipeline.student.native import Native, Parts

    real = size == "real"
    tokenizer = build_tokenizer([QUESTION, ANSWER] * 4, 560)
    control = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(control)})
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064 // 14 if real else 640,
            "hidden_size": 3584 if real else 64,
            "intermediate_size": 18944 if real else 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 28 if real else 4,
            "num_key_value_heads": 4 if real else 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24] if real else [2, 3, 3],
            },
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 1280 if real else 32,
            "intermediate_size": 3420 if real else 64,
            "num_heads": 16 if real else 2,
            "depth": 2,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 3584 if real else 64,
        },
        **ids,
    )
    model = random_weights(Qwen2_5_VLForConditionalGeneration, config, real)
    family = Native(Parts(tokenizer, Qwen2VLImageProcessorPil(), CHATML, ""), align=align)
    return model, family, (480, 640) if real else (112, 112)


def random_weights(kind: type, config, real: bool) -> torch.nn.Module:
    """A model whose weights repeat a few random numbers, which takes seconds where drawing all would take minutes."""
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.bfloat16 if real else torch.float32)
    drawn = torch.randn(1 << 20) * 0.02
    with torch.no_grad():
        model.to_empty(device="cpu")
        for module in model.modules():  # frequencies of rotary embeddings and the like
            if any(True for _ in module.buffers(recurse=False)):
                model._init_weights(module)
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.5 if "gate" in name else float(name.endswith("weight")))
            else:
                flat = weight.view(-1)
                for start in range(0, len(flat), len(drawn)):
                    flat[start : start + len(drawn)] = drawn[: len(flat) - start]
    return model


class Bench:
    """One family's model, batch and arms.

    Args:
        family: one of `FAMILIES`.
        size: ``real`` or ``tiny``.
        features: where the image's features are, or are put if they are not there.
    """

    def __init__(self, family: str, size: str, features: Path):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        align = AlignConfig()
        model, self.family, (height, width) = {"mllama": llama, "qwen2_5_vl": qwen}[family](size, align)
        self.family.prepare(model)
        self.batch = self._batch(height, width)
        self.inner = model
        model.requires_grad_(False)
        self.model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        )
        self.model.train()
        self.tap = AttentionTap(self.model, self.family)
        self.text = next(iter(self.tap.layers.values())).config
        self.align = AlignmentLoss.for_tap(self.tap, align)
        self.theirs = Aligner(self.text.num_attention_heads)
        self.layers = list(self.tap.layers)
        self.tap.close()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*weights, *self.align.parameters(), *self.theirs.parameters()], lr=1e-4)
        # For the authors' way: what each position predicts, and the maps by the text of their words.
        ids = self.batch.inputs["input_ids"][0].tolist()
        self.next_token = [self.family.tokenizer.decode([i]) for i in (*ids[1:], ids[-1])]
        texts = [self.example.word_text(word) for word in self.batch.words.word]
        self.by_text = dict(zip(texts, self.batch.targets, strict=True))
        self.matched = len({token.strip() for token in self.next_token} & self.by_text.keys())
        if not features.exists():
            with torch.no_grad():
                self._make_features(features)
        self._take_features(features)
        # A first step without gradients makes the optimizer's state, and nothing else.
        for weight in self.optimizer.param_groups[0]["params"]:
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self, height: int, width: int) -> StudentBatch:
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        turns = (Turn("user", QUESTION), Turn("assistant", ANSWER))
        self.example = Example("0", out.getvalue(), "png", turns, "", "", "")
        batch = self.family.encode([self.example])
        batch.targets = torch.rand(len(batch.words), 32, 32)
        batch.valid = torch.ones(len(batch.words), dtype=torch.bool)
        return batch

    def set(self, setting: str) -> None:
        """With or without gradient checkpointing, as the trainer does it."""
        if setting == "checkpointed":
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        elif getattr(self.inner, "is_gradient_checkpointing", False):
            self.inner.gradient_checkpointing_disable()
            self.inner.disable_input_require_grads()

    def _make_features(self, features: Path) -> None:
        inputs, core = self.batch.inputs, self.inner.model
        pixels = inputs["pixel_values"].to(self.inner.dtype)
        if "cross_attention_mask" in inputs:
            ratios = {name: inputs[name] for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
            states = core.multi_modal_projector(core.vision_model(pixel_values=pixels, **ratios).last_hidden_state)
            made = {"cross_attention_states": states.flatten(0, -3).reshape(-1, states.shape[-2], states.shape[-1])}
        else:
            made = dict(core.visual(pixels, grid_thw=inputs["image_grid_thw"]))
        torch.save(made, features)

    def _take_features(self, features: Path) -> None:
        """Replaces the image by its features, for all arms alike."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        self.pixels = self.batch.inputs
        made, inputs, core = torch.load(features), dict(self.pixels), self.inner.model
        if "cross_attention_mask" in inputs:
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                del inputs[name]
            inputs |= made
        else:
            self.visual = core.visual.forward
            core.visual.forward = lambda *args, **kwargs: BaseModelOutputWithPooling(
                **made
            )  # new: the model changes it
        self.inputs = inputs

    def loss(self, arm: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What an arm minimises, after its forward."""
        labels_BL = functional.pad(self.batch.labels[:, 1:], (0, 1), value=IGNORED)
        needed_P = (labels_BL != IGNORED).any(0).nonzero().squeeze(1)
        more = {"output_attentions": True} if arm in EAGER else {}
        if arm == "ours":
            self.tap.rows(self.batch.words)
        out = self.model(**inputs, logits_to_keep=needed_P, use_cache=False, **more)
        ce = functional.cross_entropy(out.logits.float().flatten(0, 1), labels_BL[:, needed_P].flatten())
        if arm == "ours":
            return ce + 5.0 * self.align(self.tap, self.batch)
        if arm == "eager":
            return ce + 5.0 * self._released(out.attentions)
        if arm == "batched":
            return ce + 5.0 * self._batched(out.attentions)
        return ce

    def _released(self, attentions: Sequence[torch.Tensor]) -> torch.Tensor:
        image_BL = self.pixels["input_ids"] == getattr(self.inner.config, "image_token_id", -1)
        if "cross_attention_mask" in self.batch.inputs:
            stored = [released.cross_layer(attentions[index].float(), [4]) for index in self.layers]
            places = range(image_BL.shape[1])
        else:
            stored = [released.self_layer(attentions[index].float(), ~image_BL, image_BL) for index in self.layers]
            places = (~image_BL)[0].nonzero()[:, 0].tolist()
        tokens = [self.next_token[place] for place in places]
        # Its maps are resized once more, which PyTorch cannot take back in half precision on a CPU.
        return released.loss(stored, lambda maps: self.theirs(maps).float(), [tokens], [self.by_text])

    def _batched(self, attentions: Sequence[torch.Tensor]) -> torch.Tensor:
        batch, words = self.batch, self.batch.words
        length = batch.labels.shape[1]
        maps = []
        image_L = self.pixels["input_ids"][0] == getattr(self.inner.config, "image_token_id", -1)
        for index in self.layers:
            probs_LHK = attentions[index][0].transpose(0, 1).float()
            text_RHK = probs_LHK[~image_L]
            if "cross_attention_mask" in batch.inputs:
                squares = folded_tiles(text_RHK, torch.full((len(text_RHK),), 4), 4)
            else:
                where = torch.zeros(len(text_RHK), dtype=torch.long)
                squares = folded_image(text_RHK, batch.planes.columns.flatten(1), batch.planes, where)
            maps.append(self.theirs(squares).float())
        rows_RSS = min_max(torch.stack(maps).mean(0))
        place_L = torch.zeros(length, dtype=torch.long)
        place_L[~image_L] = torch.arange(len(rows_RSS))
        picked = rows_RSS[place_L[words.row_pos]]
        return (picked - batch.targets[words.row_word]).square().mean()

    def start(self, arm: str) -> None:
        """Puts the model into an arm's attention."""
        self.tap.close()
        self.inner.set_attn_implementation({"text_config": "eager" if arm in EAGER else "sdpa"})
        if arm == "ours":
            self.tap = AttentionTap(self.model, self.family)
            assert self.text._attn_implementation == NAME

    def step(self, arm: str, whole: bool = False) -> float:
        """Seconds of one training step of an arm that was started."""
        inputs = self.inputs
        if whole:
            inputs = self.pixels | {"pixel_values": self.pixels["pixel_values"].to(self.inner.dtype)}
            if hasattr(self, "visual"):
                self.inner.model.visual.forward = self.visual
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        # As in training with `precision: bf16`.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inner.dtype == torch.bfloat16):
            loss = self.loss(arm, inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return clock() - began


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the order statistics that hold the true one with at least 93%."""
    ordered = sorted(values)
    count, depth = len(ordered), 0
    while 2 * sum(math.comb(count, k) for k in range(depth + 2)) / 2**count <= 0.07:
        depth += 1
    return statistics.median(ordered), ordered[depth], ordered[-1 - depth]


def timings(bench: Bench, pairs: int, arms: Sequence[str]) -> dict[str, float]:
    """Ratios of neighbouring steps, after one round to warm up; the arms take turns, and who begins changes."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(pairs + 1):
        for arm in arms if turn % 2 else (arms[1], arms[0], *reversed(arms[2:])):
            bench.start(arm)
            gc.collect()
            took = bench.step(arm)
            print(f"turn {turn}: {arm} {took:.2f} s", file=sys.stderr, flush=True)
            if turn:
                seconds[arm].append(took)
    found = {f"{arm}_seconds": statistics.median(seconds[arm]) for arm in arms}
    for name, above, below in (("align", "ours", "plain"), *((arm, arm, "ours") for arm in arms if arm in EAGER)):
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        name = f"{name}_time_ratio"
        found[name], found[f"{name}_low"], found[f"{name}_high"] = interval(ratios)
    return found


def peak(bench: Bench, arm: str) -> int:
    """Bytes that a step of an arm needs above what is held between two steps."""
    bench.start(arm)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    bench.step(arm)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def in_process(family: str, args: argparse.Namespace, keep: Path, *more: str) -> dict:
    """The last line that this module prints in a process of its own, as JSON; or what it printed once before."""
    kept = keep / f"{args.size}-{family}-{'-'.join(more)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    command = [sys.executable, "-m", "benchmarks.student", "--families", family, "--size", args.size,
               "--threads", str(args.threads), "--pairs", str(args.pairs), *more,
               "--features", str(keep / f"{args.size}-{family}.pt")]  # fmt: skip
    if args.batched:
        command.append("--batched")
    # Blocks of a size that counts go back to the system when they are freed, so that a peak is a peak of what is used.
    limits = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"} if "--memory-of" in more else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | limits)
    if done.returncode:
        raise SystemExit(f"{family}: {' '.join(more)} failed")
    found = json.loads(done.stdout.splitlines()[-1])
    kept.write_text(json.dumps(found))
    return found


def measure(family: str, args: argparse.Namespace, keep: Path) -> dict[str, float]:
    """All numbers of one family."""
    arms = arms_of(args)
    found: dict[str, float] = {}
    for setting in SETTINGS:
        found |= in_process(family, args, keep, "--time-of", setting)
    memory = {arm: in_process(family, args, keep, "--memory-of", arm) for arm in arms}
    for setting in SETTINGS:
        held = {arm: memory[arm][setting] for arm in arms}
        found |= {f"{arm}_megabytes_{setting}": held[arm] / 1e6 for arm in arms}
        found[f"align_memory_ratio_{setting}"] = held["ours"] / held["plain"]
        found |= {f"{arm}_memory_ratio_{setting}": held[arm] / held["ours"] for arm in arms if arm in EAGER}
        for arm in arms:
            print(
                f"{family:<12} {setting:<13} {arm:<8} {found[f'{arm}_seconds_{setting}']:8.2f} s"
                f" {held[arm] / 1e6:8.0f} MB above weights and optimizer state",
                flush=True,
            )
    for name in ("time", "memory"):
        for arm, worse in (("align", max), *((arm, min) for arm in arms if arm in EAGER)):
            found[f"{arm}_{name}_ratio"] = worse(found[f"{arm}_{name}_ratio_{setting}"] for setting in SETTINGS)
    return {f"{family}_{name}": value for name, value in found.items()}


def arms_of(args: argparse.Namespace) -> tuple[str, ...]:
    return (*ARMS, "batched") if args.batched else ARMS


def one(args: argparse.Namespace) -> dict[str, float]:
    """What one of the processes measures."""
    bench = Bench(args.families, args.size, args.features)
    found: dict[str, float] = {}
    if args.memory_of:
        for setting in SETTINGS:
            bench.set(setting)
            if not found:
                bench.start(args.memory_of)
                bench.step(args.memory_of)  # libraries keep some memory from their first use on
            found[setting] = peak(bench, args.memory_of)
        return found
    bench.set(args.time_of)
    part = timings(bench, args.pairs, arms_of(args))
    found |= {f"{name}_{args.time_of}": value for name, value in part.items()}
    if args.time_of == SETTINGS[-1]:
        bench.start("ours")
        found["whole_step_seconds"] = bench.step("ours", whole=True)
    words = bench.batch.words
    return found | {
        "words": len(words),
        "matched": bench.matched,
        "rows": len(words.row_word),
        "tokens": bench.batch.labels.shape[1],
        "parameters": sum(p.numel() for p in bench.inner.parameters()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="directory for the numbers of each part")
    parser.add_argument("--batched", action="store_true", help="time the arm `batched` too")
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--time-of", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    families = args.families.split(",")
    if unknown := sorted(set(families) - set(FAMILIES)):
        parser.error(f"--families {unknown[0]}: choose some of {', '.join(FAMILIES)}")
    if args.time_of or args.memory_of:
        print(json.dumps(one(args)))
        return 0
    result: dict = {"size": args.size, "threads": args.threads, "pairs": args.pairs, "device": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        keep = args.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        for family in families:
            result |= measure(family, args, keep)
    result = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
    print(f"RESULT {json.dumps(result)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

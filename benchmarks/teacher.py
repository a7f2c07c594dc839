"""What the capture costs: `make bench-teacher`.

    python -m benchmarks.teacher --shapes sd14 --batch 1 --repeat 3 --json out.json

Random weights in the shapes of Stable Diffusion v1.4 (or a tiny model for a smoke run), on all cores unless
`--threads` says less, and a caption cut as CLIP's vocabulary cuts it. All arms of a ratio run in turns in one process,
so that a slow moment hits them alike, and each counts with its fastest turn, because other processes can only add; on
the CPU in processor time, which a process that waits for a core is not charged (images per second are of the wall). No
further turn begins that would not end within `--minutes`; the result says how many there were. Memory is measured with
each arm in a process of its own, as the peak above what the weights take; on the CPU the C library is told to give
every tensor back when it is freed, because what its heap keeps differs by a fifth from run to run. Arms, all ending at
the same block:

    bare     the conditional forward with fused attention and no capture
    capture  the same with word maps of all layers summed up inside the attention
    refine   the same with self-attention refinement of power 1
    store    every head of every layer kept and turned into maps token by token afterwards, as DAAM does, but for the
             words' tokens alone
    daam     the same for all 77 positions of the text, as DAAM itself does (its cross-attention only, see below)
    early    capture of the middle grids only, ending at their last block
    full     the whole UNet, no capture (for what the early exit saves)

What `capture` and `store` add to a forward is less than two forwards of a busy machine differ from each other. So it is
measured where it arises: the calls of all cross-attention layers of one forward are recorded and played again, without
and with each way of keeping maps, and what comes after the forward is added. `store_all_overhead_ratio` is that of
`store` divided by that of `capture`. On a GPU the share of its peak is given for `--peak-tflops` (989 for an H100 in
bfloat16). The last line is `RESULT {...}`.
"""

import argparse
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.engine import cores
from pipeline.examples import Example, Turn
from pipeline.teacher.capture import Capture, token_weights
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.extract import Item, Teacher
from pipeline.teacher.unet import UNetAdapter
from pipeline.teacher.windows import teacher_texts

CAPTION = (
    "What is going on here?",
    "A man in a red windbreaker rides a palomino horse along the beach, and two dogs run behind.",
)
# The merges of CLIP's vocabulary (Radford et al., 2021) that cut this caption, in their order: 28 tokens for 23 words.
MERGES = """i n|t h|a n|r e|e r|th e</w>|in g</w>|o n|o r|o n</w>|a l|e r</w>|i n</w>|i s</w>|a t</w>|an d</w>|e s</w>
|a c|o m|a n</w>|r i|b e|w h|s e</w>|d o|er e</w>|g o|r u|re d</w>|h ere</w>|wh at</w>|m an</w>|a k|w in|on g</w>|b re
|t w
|ac h</w>|tw o</w>|go ing</w>|g s</w>|h or|d es</w>|h in|p al|ru n</w>|be ach</w>|bre ak|be hin|behin d</w>|al ong</w>
|in o</w>|do gs</w>|hor se</w>|win d|ri des</w>|break er</w>|pal om"""
VOCABULARY = 49408  # CLIP's, for the size of the embedding
ARMS = ("bare", "capture", "refine", "store", "early", "full")
WHOLE = ("bare", "capture", "refine", "early", "full")  # timed as whole forwards
MEASURED = ("bare", "capture", "refine", "store")  # whose memory is measured
LAYERS = ("bare", "capture", "store", "daam")  # timed on the cross-attention layers alone
REPLAYS = 5
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # for glibc: allocations from 64 KiB on are mapped one by one
FORWARDS = 0.7  # share of the time that is gone when the last turn of whole forwards ends; the stage gets the rest


def caption_tokenizer():
    """A tokenizer of bytes and `MERGES`, which cuts `CAPTION` as CLIP's own does."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = [tuple(merge.split()) for merge in MERGES.replace("\n", "").split("|")]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(merge) for merge in merges]
    vocab = {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def parts(shapes: str) -> dict:
    """Random components in the shapes of Stable Diffusion v1.4, or tiny ones."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    real = shapes == "sd14"
    tokenizer = caption_tokenizer()
    widths = (320, 640, 1280, 1280) if real else (32, 64)
    unet = UNet2DConditionModel(
        sample_size=64 if real else 16,
        block_out_channels=widths,
        layers_per_block=2 if real else 1,
        norm_num_groups=32 if real else 8,
        down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
        cross_attention_dim=768 if real else 32,
        attention_head_dim=8 if real else 2,
    )
    vae_widths = (128, 256, 512, 512) if real else (16, 32)
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
        layers_per_block=2 if real else 1,
        norm_num_groups=32 if real else 8,
        latent_channels=4,
    )
    vae.decoder = vae.post_quant_conv = None
    width = 768 if real else 32
    text = CLIPTextConfig(
        vocab_size=VOCABULARY if real else len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if real else 2,
        num_attention_heads=12 if real else 2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    found = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }
    for part in found.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return found


class StoreAll:
    """DAAM's way: the probabilities of every head, kept until the end."""

    def __init__(self, kept: list[torch.Tensor]):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(part(x)) for part, x in (
            (attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
        if encoder_hidden_states is None:
            shape = (-1, attn.heads)
            out = F.scaled_dot_product_attention(*(x.unflatten(0, shape) for x in (q, k, v))).flatten(0, 1)
        else:
            probs = attn.get_attention_scores(q, k, attention_mask)
            self.kept.append(probs.unflatten(0, (-1, attn.heads)))
            out = probs @ v
        return attn.to_out[0](attn.batch_to_head_dim(out))


class Bench:
    """The arms over one model and one batch."""

    def __init__(self, args: argparse.Namespace):
        self.batch = args.batch
        cfg = TeacherConfig(name="bench", path="random", batch_size=args.batch, dtype=args.dtype, timesteps=[100])
        refined = TeacherConfig(**{**vars(cfg), "refine": 1, "refine_resolution": 32 if args.shapes == "sd14" else 16})
        self.device = torch.device(args.device)
        found = parts(args.shapes)
        dtype = getattr(torch, args.dtype)
        for part in found.values():
            if isinstance(part, torch.nn.Module):
                part.to(self.device, dtype)
        self.whole = found["unet"]
        middle = [16, 32] if args.shapes == "sd14" else [8]
        early = TeacherConfig(**{**vars(cfg), "resolutions": middle})
        self.processors: dict[str, dict] = {}
        self.adapters = {}
        for name, settings in (("refine", refined), ("early", early), ("capture", cfg)):
            self.adapters[name] = UNetAdapter(found, settings, self.device)
            self.processors[name] = dict(self.whole.attn_processors)
        self.teacher = Teacher(cfg, self.adapters["capture"])
        turns = (Turn("user", CAPTION[0]), Turn("assistant", CAPTION[1]))
        self.text = teacher_texts(Example("0", None, "", turns, "", "", ""))[0]
        side = self.adapters["capture"].text
        groups = [[[ranges] for ranges in side.ranges(self.text.text, self.text.spans)]] * args.batch
        self.tokens_BTW = token_weights(groups, side.positions, len(self.text.spans)).to(self.device)
        self.tokens = side.count(self.text.text)
        adapter = self.adapters["capture"]
        size = (adapter.side, adapter.side)
        self.grids = {name: own.grids(size) for name, own in self.adapters.items()}
        self.latents = torch.randn((args.batch, *adapter.latent_shape(size)), device=self.device)
        self.condition = adapter.condition([self.text.text] * args.batch)
        self.kept_bytes: dict[str, int] = {}  # by what was kept, when the last forward of an arm ended

    @torch.no_grad()
    def run(self, arm: str) -> torch.Tensor | None:
        """One forward of an arm, and its maps where it makes any."""
        maps = None
        adapter = self.adapters.get(arm, self.adapters["capture"])
        if arm == "store":
            maps = self._store(adapter)
        elif arm in self.adapters:
            self.whole.set_attn_processor(dict(self.processors[arm]))
            capture = Capture(self.grids[arm], self.tokens_BTW, None, adapter.cfg.refine, adapter.refine_side)
            adapter.forward(self.latents, 100, self.condition, capture)
            self.kept_bytes[arm] = sum(kept.nbytes for kept in (*capture.sums.values(), *capture.words.values()))
            maps = capture.word_maps()
        else:
            self.whole.set_attn_processor(dict(self.processors["capture"]))
            unet = self.whole if arm == "full" else adapter.unet
            adapter._run(unet, self.latents, 100, self.condition, self.condition.hidden_BTC, None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return maps

    @torch.no_grad()
    def record(self) -> None:
        """Notes the calls of the cross-attention layers in a bare forward."""
        self.calls: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []

        def note(module, args, kwargs) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.calls.append((module, hidden, kwargs["encoder_hidden_states"]))

        hooks = [
            module.register_forward_pre_hook(note, with_kwargs=True)
            for name, module in self.whole.named_modules()
            if name.endswith(".attn2")
        ]
        self.run("bare")
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def replay(self, arm: str) -> torch.Tensor | None:
        """The recorded layers alone, and the maps made of what they left: none for `bare`; for `capture`, `store` and
        `daam` see above."""
        extra: dict[str, Capture] = {}
        kept: list[torch.Tensor] = []
        if arm in ("store", "daam"):
            self.whole.set_attn_processor({name: StoreAll(kept) for name in self.whole.attn_processors})
        else:
            self.whole.set_attn_processor(dict(self.processors["capture"]))
        if arm == "capture":
            extra = {"capture": Capture(self.grids[arm], self.tokens_BTW)}
        for module, hidden, context in self.calls:
            module(hidden, encoder_hidden_states=context, **extra)
        maps = None
        if arm in ("store", "daam"):
            maps = self._heat_maps(kept) if arm == "store" else self._all_heat_maps(kept)
            self.kept_bytes[arm] = sum(probs.nbytes for probs in kept)
        elif arm == "capture":
            maps = extra["capture"].word_maps()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return maps

    def _store(self, adapter: UNetAdapter) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        self.whole.set_attn_processor({name: StoreAll(kept) for name in self.whole.attn_processors})
        adapter._run(adapter.unet, self.latents, 100, self.condition, self.condition.hidden_BTC, None)
        return self._heat_maps(kept)

    def _heat_maps(self, kept: list[torch.Tensor]) -> torch.Tensor:
        """A map (B, W, 64, 64) of each word from all that was kept, token by token."""
        found = []
        for row in range(self.batch):
            for word in range(self.tokens_BTW.shape[2]):
                maps = []
                for position in self.tokens_BTW[row, :, word].nonzero().flatten().tolist():
                    for probs_BHNT in kept:
                        side = int(probs_BHNT.shape[2] ** 0.5)
                        heads_HYX = probs_BHNT[row, :, :, position].float().unflatten(-1, (side, side))
                        maps.append(F.interpolate(heads_HYX[None], size=(64, 64), mode="bicubic").clamp_min(0)[0])
                found.append(torch.stack([m.mean(0) for m in maps]).mean(0))
        return torch.stack(found).unflatten(0, (self.batch, -1))

    def _all_heat_maps(self, kept: list[torch.Tensor]) -> torch.Tensor:
        """The same from a map (T, 64, 64) of every position of the text, as DAAM makes them: of each head of each
        layer, then their mean, then words."""
        found = []
        for row in range(self.batch):
            maps = []
            for probs_BHNT in kept:
                side = int(probs_BHNT.shape[2] ** 0.5)
                by_token = [
                    probs_BHNT[row, :, :, t].float().unflatten(-1, (side, side)) for t in range(probs_BHNT.shape[3])
                ]
                for head_TYX in torch.stack(by_token, 1):
                    maps.append(F.interpolate(head_TYX[:, None], size=(64, 64), mode="bicubic").clamp_min(0))
            mean_TYX = torch.stack(maps).mean(0)[:, 0]
            found.append(torch.einsum("tyx,tw->wyx", mean_TYX, self.tokens_BTW[row]))
        return torch.stack(found)


class Turns(dict[str, float]):
    """Seconds of the fastest turn of each run by one clock; the same on the wall, and how many turns there were."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.count = 0


def in_turns(
    runs: dict[str, Callable[[], object]],
    repeat: int,
    end: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Times runs that take turns: `repeat` times, but no turn after the first begins that would, if it takes as long
    as the longest before it, not end by `end` (of `time.monotonic`)."""
    out, longest = Turns(), 0.0
    while out.count < repeat and (not out.count or time.monotonic() + longest < end):
        first = time.monotonic()
        for name, call in runs.items():
            gc.collect()
            began, wall = clock(), time.monotonic()
            call()
            out[name] = min(out.get(name, float("inf")), clock() - began)
            out.wall[name] = min(out.wall.get(name, float("inf")), time.monotonic() - wall)
        out.count += 1
        longest = max(longest, time.monotonic() - first)
    return out


@torch.no_grad()
def tera_operations(bench: Bench) -> float:
    """Floating-point operations of a bare forward, in units of 10^12."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bench.run("bare")
    return counter.get_total_flops() / 1e12


def peak_above_weights(arm: str, args: argparse.Namespace) -> int:
    """Bytes that an arm needs above the weights: a process of its own, peak after loading minus what was there."""
    bench = Bench(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.run(arm)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    bench.run(arm)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def memory(args: argparse.Namespace) -> dict[str, int]:
    """Bytes above the weights of each arm."""
    found = {}
    for arm in args.memory_arms.split(","):
        command = [sys.executable, "-m", "benchmarks.teacher", "--memory-of", arm, "--shapes", args.shapes,
                   "--batch", str(args.batch), "--threads", str(args.threads), "--dtype", args.dtype,
                   "--device", args.device]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
        found[arm] = int(done.stdout.split()[-1])
    return found


@torch.no_grad()
def stage(bench: Bench, images: int, repeat: int, end: float, clock: Callable[[], float]) -> Turns:
    """Seconds of reading `images` pictures from files to stored maps, and of its bare parts one by one."""
    from pipeline.examples import decode
    from pipeline.mapstore.schema import example_maps
    from pipeline.mapstore.write import write_shard

    adapter = bench.adapters["capture"]
    rng = np.random.default_rng(0)
    files = []
    for _ in range(images):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(out, "JPEG")
        files.append(out.getvalue())
    text = bench.text
    pixels = [adapter.pixels(decode(data)) for data in files]
    batches = [torch.stack(pixels[i : i + bench.batch]) for i in range(0, images, bench.batch)]

    def whole() -> None:
        bench.whole.set_attn_processor(dict(bench.processors["capture"]))
        with tempfile.TemporaryDirectory() as folder:
            items = (Item(decode(data), number, number, text, str(number)) for number, data in enumerate(files))
            found = list(bench.teacher.read(items))
            rows = [example_maps(str(n), list(f.words), f.maps, f.found) for n, f in enumerate(found)]
            write_shard(Path(folder) / "00000.zarr", rows)

    def every(call: Callable[[torch.Tensor], object]) -> None:
        for batch in batches:
            call(batch)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    return in_turns(
        {
            "stage": whole,
            "decode": lambda: [adapter.pixels(decode(data)) for data in files],
            "vae": lambda: every(adapter.latents),
            "text": lambda: every(lambda batch: adapter.condition([text.text] * bench.batch)),
            "unet": lambda: every(lambda batch: bench.run("bare")),
        },
        repeat,
        end,
        clock,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("sd14", "tiny"), default="sd14")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, help="most turns of every arm")
    parser.add_argument("--minutes", type=float, default=10.0, help="no further turn begins that would end later")
    parser.add_argument("--images", type=int, default=1, help="images of the whole-stage measurement")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the GPU in this precision")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--memory-arms", default=",".join(MEASURED), help="arms whose memory is measured, bare and capture among them"
    )
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_above_weights(args.memory_of, args))
        return 0
    began = time.monotonic()
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def end(share: float) -> float:
        return began + share * args.minutes * 60

    memory_of = memory(args)
    print("  ".join(f"{arm} {value / 1e6:.0f} MB above the weights" for arm, value in memory_of.items()), flush=True)
    bench = Bench(args)
    bench.record()
    layers = in_turns({arm: lambda arm=arm: bench.replay(arm) for arm in LAYERS}, REPLAYS, end(FORWARDS), clock)
    seconds = in_turns({arm: lambda arm=arm: bench.run(arm) for arm in WHOLE}, args.repeat, end(FORWARDS), clock)
    for arm in (*ARMS, "daam"):
        time_of = f"{seconds[arm]:8.3f} s" if arm in seconds else f"{'':10}"
        alone = f"  {layers[arm]:7.3f} s its cross-attention alone" if arm in layers else ""
        print(f"{arm:<8} {time_of}{alone}", flush=True)
    images = max(args.images, args.batch)
    whole = stage(bench, images, max(1, args.repeat - 1), end(1), clock)
    print("  ".join(f"{name} {value:.3f} s" for name, value in whole.items()), flush=True)
    bare_parts = sum(value for name, value in whole.items() if name != "stage")
    overheads = {arm: layers[arm] - layers["bare"] for arm in LAYERS[1:]}
    ours = max(overheads["capture"], 1e-9)
    result = {
        "shapes": args.shapes,
        "device": args.device,
        "dtype": args.dtype,
        "batch": args.batch,
        "threads": args.threads,
        "clock": "processor" if args.device == "cpu" else "wall",
        "words": len(bench.text.spans),
        "tokens": bench.tokens,
        "bare_seconds": seconds["bare"],
        "capture_time_ratio": seconds["capture"] / seconds["bare"],
        "capture_memory_ratio": memory_of["capture"] / memory_of["bare"],
        "refine_time_ratio": seconds["refine"] / seconds["bare"],
        "capture_overhead_share": overheads["capture"] / seconds["bare"],
        "store_all_overhead_share": overheads["store"] / seconds["bare"],
        "store_all_overhead_ratio": overheads["store"] / ours,
        "daam_overhead_ratio": overheads["daam"] / ours,
        "kept_bytes": bench.kept_bytes["capture"],
        "store_all_kept_bytes": bench.kept_bytes["store"],
        "early_exit_ratio": seconds["early"] / seconds["full"],
        "stage_vs_parts": bare_parts / whole["stage"],
        "images_per_second": images / whole.wall["stage"],
        "nfe": 1,
        "null_text_nfe": TeacherConfig(name="n", path="", inversion="null-text", timesteps=[]).forwards,
        "hours_for_130000": 130_000 * whole.wall["stage"] / images / 3600,
        "forward_turns": seconds.count,
        "layer_turns": layers.count,
        "stage_turns": whole.count,
        "minutes": (time.monotonic() - began) / 60,
    }
    for arm, name in (("refine", "refine_memory_ratio"), ("store", "store_all_memory_ratio")):
        if arm in memory_of:
            result[name] = memory_of[arm] / memory_of["bare"]
    if args.peak_tflops:
        result["peak_share"] = tera_operations(bench) / seconds["bare"] / args.peak_tflops
    result = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
    print(f"RESULT {json.dumps(result)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

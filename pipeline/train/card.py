"""The model card: a README.md beside the exported weights, with data, settings, versions and metrics."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline import receipts
from pipeline.student.weights import model_path

if TYPE_CHECKING:
    from pipeline.config import Config

FILE = "README.md"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")
NUMBERS = ("loss", "ce", "align")
HELD_OUT = (*NUMBERS, "correlation", "peak_inside", "examples")


def write(
    folder: Path, cfg: Config, examples: int, steps: int, lines: list[dict], heldout: list[dict], difference: float
) -> Path:
    """Writes the card into an exported directory.

    Args:
        folder: ``adapter/`` or ``model/``.
        examples: that were trained on.
        steps: optimizer steps of the whole run.
        lines, heldout: of ``metrics.jsonl``, see `metrics.read` and `metrics.heldout`.
        difference: of the reloaded logits, as a share of the largest.
    """
    adapter = (folder / "adapter_config.json").is_file()
    licence = base_licence(cfg)
    head = {
        "base_model": cfg.model.path,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lavender", "vision-language", *(["lora"] if cfg.train.method == "lora" else [])],
        **({"license": licence} if licence else {}),
    }
    aligned = cfg.arm.lam > 0
    what = "attention alignment (Lavender)" if aligned else "plain supervised fine-tuning"
    base = f"`{cfg.model.path}`" + (", **its weights drawn at random**" if cfg.model.weights == "random" else "")
    sections = {
        f"{cfg.model.name}, {cfg.arm.name}, seed {cfg.seed}": [
            f"{base}, fine-tuned on `{cfg.data.name}` by {what}: " + (_method(cfg, adapter)),
        ],
        "Intended use": [
            "Questions about an image in the style of the training data, and the study of where a model looks. It was "
            "not tested for anything else: not for decisions about people, medical, legal or safety matters. It keeps "
            "the limits and the biases of its base and of its data, and can state things that are not in the image.",
        ],
        "How to load": ["```python", *_loading(cfg, adapter), "```"],
        "Data": [
            f"- data: `{cfg.data.name}` (kind `{cfg.data.kind}`), split `{cfg.train.split}`, {examples} examples",
            f"- licence of the data: {cfg.data.licence}",
            *(
                [f"- maps of the teacher: `{cfg.teacher.name}` (`{cfg.teacher.path}`)"]
                if aligned and cfg.arm.targets in ("teacher", "shuffled")
                else []
            ),
            *([f"- attention is pulled towards: {cfg.arm.targets}"] if aligned else []),
        ],
        "Settings": [
            "```yaml",
            yaml.safe_dump(_settings(cfg, steps), sort_keys=False, default_flow_style=None, width=100).rstrip(),
            "```",
        ],
        "Metrics": _metrics(lines) + _held_out(cfg, heldout),
        "Checked": [
            "Loaded again from these files, the model's logits differ from those it had at the end of training by at "
            f"most {difference:.1e} of the largest.",
        ],
        "Versions": [f"- {name} {version}" for name, version in _versions().items()],
        "Licence": [
            "The weights derive from the base model: its licence holds for them"
            + (f" (`{licence}`)." if licence else f"; see the card of `{cfg.model.path}`."),
        ],
    }
    body = "\n\n".join(
        f"{'#' if number == 0 else '##'} {title}\n\n" + "\n".join(text)
        for number, (title, text) in enumerate(sections.items())
    )
    path = folder / FILE
    receipts.write_file(path, f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}\n".encode())
    return path


def base_licence(cfg: Config) -> str:
    """The licence that the base's own card states; empty if it has none here."""
    if cfg.model.path.startswith("bundled:"):
        return "apache-2.0"  # a part of this package
    card = Path(model_path(cfg.model.path)).expanduser() / FILE
    if not card.is_file():
        return ""
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return ""
    found = yaml.safe_load(parts[1]) or {}
    return str(found.get("license_name") or found.get("license") or "")


def _method(cfg: Config, adapter: bool) -> str:
    if cfg.train.method == "full":
        return "every weight that `freeze` does not hold."
    shape = f"low-rank adapters (r {cfg.train.lora.r}, alpha {cfg.train.lora.alpha})"
    return f"{shape}, to be loaded on the base." if adapter else f"{shape}, merged into the weights."


def _loading(cfg: Config, adapter: bool) -> list[str]:
    if adapter:
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'base = AutoModelForImageTextToText.from_pretrained("{cfg.model.path}", dtype="{cfg.model.dtype}")',
            'model = PeftModel.from_pretrained(base, "this directory")',
            'processor = AutoProcessor.from_pretrained("this directory")',
        ]
    return [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("this directory", dtype="{cfg.model.dtype}")',
        'processor = AutoProcessor.from_pretrained("this directory")',
    ]


def _settings(cfg: Config, steps: int) -> dict:
    from pipeline.train import status

    found = receipts.plain({**status.settings(cfg), "steps": steps})
    if cfg.train.method == "full":
        del found["train"]["lora"]
    return found


def _metrics(lines: list[dict]) -> list[str]:
    if not lines:
        return ["None were logged."]
    return [*_table(lines, NUMBERS), "", "Means over the global batches since the line before, on the training data."]


def _held_out(cfg: Config, lines: list[dict]) -> list[str]:
    if not lines:
        return []
    chosen = "that of the lowest loss" if cfg.train.choose == "best" else "the last"
    where = f"split `{cfg.train.held_out_split}`" if cfg.train.held_out_split else "the training split, left out of it"
    told = f"On held-out examples of {where}; the step exported is {chosen}."
    return ["", *_table(lines, HELD_OUT, every=True), "", told]


def _table(lines: list[dict], names: tuple[str, ...], every: bool = False) -> list[str]:
    kept = [name for name in names if any(line.get(name) is not None for line in lines)]
    rows = lines if every or len(lines) < 2 else [lines[0], lines[-1]]
    table = [f"| step | {' | '.join(kept)} |", "|" + " --- |" * (len(kept) + 1)]
    for row in rows:
        found = (row.get(name) for name in kept)
        cells = (f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value) for value in found)
        table.append(f"| {row['step']} | {' | '.join(cells)} |")
    return table


def _versions() -> dict[str, str]:
    found = {"python": receipts.versions()["python"]}
    for package in ("lavender-pipeline", *PACKAGES):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

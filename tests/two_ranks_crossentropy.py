"""One process of two whose weights are sharded: the language loss and its gradients in chunks, at once, and alone.

torchrun tests/two_ranks_crossentropy.py KIND FOLDER
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu  # noqa: F401 (accelerate then shards without GPUs)
import torch
from student_models import build_student
from test_student_families import TEXT, example

from pipeline.student.capture import AttentionTap
from pipeline.student.load import load_student
from pipeline.train import crossentropy, parallel
from pipeline.train.config import TrainConfig
from pipeline.train.tuned import Tuned, vocabulary

ROWS = 3  # positions whose logits are computed at once


def batches(family):
    """The batch of each process."""
    seen = example("What colour is the circle?", "a small red circle and a blue square", (50, 90))
    return [family.encode([seen, TEXT]), family.encode([example("two", "a blue square", (64, 64)), TEXT])]


def gradients(module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    student = load_student(build_student(kind, folder / str(rank)))
    model = student.model.train()
    tap = AttentionTap(model, student.family)
    # Nothing to align, so that the wrapper's forward is the language loss alone.
    tuned = Tuned(model, torch.nn.Identity(), tap)
    tuned.forward = lambda batch: (tap.rows(None), tuned.language(batch))[1]
    parts = batches(student.family)
    alone = sum(tuned(part) for part in parts)
    alone.backward()
    expected = {name: grad / 2 for name, grad in gradients(tuned).items()}  # FSDP gives the mean over processes
    expected_loss = [tuned(part).item() for part in parts][rank]
    tuned.zero_grad()

    cfg = TrainConfig(parallel="fsdp", trackers=[])
    accelerator = parallel.accelerator(cfg, folder)
    wrapped, _ = parallel.prepare(accelerator, tuned, torch.optim.SGD(tuned.parameters()), cfg)
    assert accelerator.is_fsdp2
    calls, chunks = [], crossentropy._chunks
    crossentropy._chunks = lambda hidden, *args: calls.append(len(hidden)) or chunks(hidden, *args)
    found = {}
    for way, size in (("chunks", ROWS * 4 * vocabulary(tuned.get_output_embeddings())), ("whole", 1 << 30)):
        tuned.logits_bytes = size
        for _ in range(2):  # the second time what the student does with its logits is known
            wrapped.zero_grad()
            loss = wrapped(parts[rank])
            loss.backward()
        made = gradients(wrapped)
        largest = max(float(grad.abs().max()) for grad in expected.values())
        gap = max(float((made[name] - grad).abs().max()) for name, grad in expected.items() if name in made)
        missing = sorted(expected.keys() - made.keys())
        found[way] = [gap / largest, missing, abs(loss.item() / expected_loss - 1), len(calls), tuned._whole]
    if rank == 0:
        (folder / "out.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Cross-entropy in chunks: the numbers of the plain one, in every family, and no logits of all positions anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from student_models import KINDS, build_student
from test_student_families import TEXT, example
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.student.batch import IGNORED
from pipeline.student.capture import AttentionTap
from pipeline.student.load import load_student
from pipeline.train.tuned import Tuned, vocabulary

FEW = ("mllama", "gemma3", "paligemma", "minicpm-llama3-v25", "openflamingo-4b")
ROWS = 3  # positions whose logits are computed at once


class Largest(TorchDispatchMode):
    """The most elements of any tensor made that has the vocabulary as its last dimension, but for the head's weight and
    its gradient, which some products make lying on their side."""

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.weight, self.vocabulary, self.found = {p.shape[::-1] for p in head.parameters()}, vocabulary(head), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                if tensor.shape[-2:] in self.weight:
                    continue
                self.found = max(self.found, tensor.numel())
        return made


def batch_of(student):
    examples = [
        example("What colour is the circle?", "a small red circle and a blue square", (50, 90)),
        example("two", "red", (64, 64)),
        TEXT,
    ]
    return student.family.encode(examples)


def language(model, student, batch, logits_bytes: int):
    """The sum, every gradient, and the largest logits."""
    model.zero_grad()
    with AttentionTap(model, student.family) as tap:
        tap.rows(None)
        tuned = Tuned(model, torch.nn.Identity(), tap, logits_bytes)
        with Largest(tuned.get_output_embeddings()) as largest:
            ce = tuned.language(batch)
            ce.backward()
    return ce.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, largest.found


def compare(model, student, batch) -> None:
    needed = int((batch.labels[:, 1:] != IGNORED).any(0).sum()) * len(batch.labels)
    with AttentionTap(model, student.family) as tap:
        words = vocabulary(Tuned(model, torch.nn.Identity(), tap).get_output_embeddings())
    plain, expected, whole = language(model, student, batch, 1 << 30)
    chunked, found, held = language(model, student, batch, ROWS * words * 4)
    assert whole == needed * words > ROWS * words
    assert held <= ROWS * words, "logits of more positions were there at once"
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=2e-5 * largest, msg=name)


@pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
)
def test_chunks_give_the_plain_sum_and_gradients(kind, tmp_path):
    student = load_student(build_student(kind, tmp_path))
    compare(student.model, student, batch_of(student))


def test_a_cap_on_the_logits_is_heeded_where_the_model_does_and_only_there(tmp_path):
    for kind in ("paligemma", "gemma3"):  # the first caps its logits, the second has the setting only
        student = load_student(build_student(kind, tmp_path / kind))
        batch = batch_of(student)
        before = language(student.model, student, batch, 1 << 30)[0]
        student.model.config.get_text_config().final_logit_softcapping = 0.05
        assert (language(student.model, student, batch, 1 << 30)[0] != before) == (kind == "paligemma")
        compare(student.model, student, batch)


def test_adapters_on_the_head_learn_from_chunks_as_from_the_whole(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = load_student(build_student("mllama", tmp_path))
    settings = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(student.model, settings)
    compare(model, student, batch_of(student))


def test_a_model_that_treats_its_logits_in_an_unknown_way_falls_back_and_says_so(tmp_path, capsys):
    student = load_student(build_student("mllama", tmp_path))
    batch = batch_of(student)

    def cube(module, args, output):
        output.logits = output.logits**3
        return output

    student.model.register_forward_hook(cube)
    plain = language(student.model, student, batch, 1 << 30)[0]
    assert "held at once" not in capsys.readouterr().out
    assert language(student.model, student, batch, 4096)[0] == plain
    assert "what it does with its logits is not known" in capsys.readouterr().out


def test_a_batch_without_labels_gives_zero_and_gradients_of_zero(tmp_path):
    """What a process is given to keep up with others: the same layers run, and nothing is learnt."""
    for kind in ("mllama", "qwen2_5_vl"):
        student = load_student(build_student(kind, tmp_path / kind))
        batch = batch_of(student)
        batch.labels.fill_(IGNORED)
        ce, gradients, _ = language(student.model, student, batch, 1 << 30)
        assert ce == 0
        assert len(gradients) > 10
        assert not any(grad.any() for grad in gradients.values())


@pytest.mark.full
@pytest.mark.parametrize("kind", ["mllama", "gemma3"])
def test_two_processes_with_sharded_weights_compute_the_same_in_chunks(kind, tmp_path):
    script = str(Path(__file__).parent / "two_ranks_crossentropy.py")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*argv, script, kind, str(tmp_path)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    for way, (gap, missing, loss, calls, gave_up) in found.items():
        assert gap < 1e-5 and loss < 1e-6 and not missing, way
        assert calls == 2 and not gave_up, "the first way is the one in chunks"

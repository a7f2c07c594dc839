"""Learned parallel attention: its maps against loops, its gradients, checkpointing, and where it is refused."""

import pytest
import torch
from student_models import build
from test_student_capture import example

from pipeline.align.config import AlignConfig
from pipeline.align.loss import AlignmentLoss
from pipeline.errors import UserError
from pipeline.student.capture import AttentionTap
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.world.student import build_mllama

LEARNED = AlignConfig(attention="learned")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = build("internvl", tmp_path_factory.mktemp("internvl"))  # several tiles and a thumbnail
    return load_student(ModelConfig(name="t", path=str(path)))


@pytest.fixture
def batch(student):
    made = student.family.encode(
        [
            example("What colour is the circle?", "a small red circle and a blue square", (40, 90), "1"),
            example("two", "red", (64, 64), "2"),
        ]
    )
    made.targets = torch.rand(len(made.words), 32, 32)
    return made


def test_maps_equal_loops(student, batch):
    kept = {}
    with AttentionTap(student.model, student.family) as tap, torch.no_grad():
        align = AlignmentLoss.for_tap(tap, LEARNED)
        hooks = [
            module.register_forward_pre_hook(
                lambda m, a, k, i=i: kept.update({i: k["hidden_states"]}), with_kwargs=True
            )
            for i, module in tap.layers.items()
        ]
        tap.rows(batch.words)
        student.model(**batch.inputs)
        found = align.parallel(tap, batch)
        for hook in hooks:
            hook.remove()
    words, planes = batch.words, batch.planes
    for layer, (index, hidden) in zip(found, kept.items(), strict=True):
        for w in range(len(words)):
            b = int(words.word_example[w])
            used = [
                (t, y, x)
                for t, y, x in torch.cartesian_prod(*map(torch.arange, planes.columns.shape[1:])).tolist()
                if planes.rows_y[b, t, :, y].any() and planes.rows_x[b, t, :, x].any()
            ]
            for h in (0, align.parallel.heads - 1):
                part = slice(32 * h, 32 * h + 32)
                query_w, key_w = (
                    align.parallel.query[str(index)].weight[part],
                    align.parallel.key[str(index)].weight[part],
                )
                share = 0
                rows = [r for r in range(len(words.row_word)) if words.row_word[r] == w]
                for r in rows:
                    query = query_w @ hidden[b, words.row_pos[r]]
                    keys = torch.stack([key_w @ hidden[b, planes.columns[b, t, y, x]] for t, y, x in used])
                    share = share + (keys @ query / 32**0.5).softmax(0) / len(rows)
                expected = sum(
                    s * torch.outer(planes.rows_y[b, t, :, y], planes.rows_x[b, t, :, x])
                    for s, (t, y, x) in zip(share, used, strict=True)
                )
                torch.testing.assert_close(layer[w, h], expected * 1024, atol=1e-4, rtol=1e-4)


def test_it_teaches_the_hidden_states_and_its_own_weights_also_when_checkpointed(student, batch):
    model = student.model.train()
    grads = []
    try:
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with AttentionTap(model, student.family) as tap:
                torch.manual_seed(0)
                align = AlignmentLoss.for_tap(tap, LEARNED)
                tap.rows(batch.words)
                model.zero_grad()
                model(**batch.inputs, use_cache=False)
                align(tap, batch).backward()
            named = {
                n: p
                for n, p in model.named_parameters()
                if "layers.0.mlp" in n or n.endswith("0.self_attn.q_proj.weight")
            }
            grads.append([p.grad for p in [*named.values(), *align.parameters()] if p.grad is not None])
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in align.parallel.parameters())
        assert len(grads[0]) == len(grads[1])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()


def test_without_words_its_weights_still_have_gradients_and_cross_attention_is_refused(student, tmp_path):
    with AttentionTap(student.model, student.family) as tap:
        align = AlignmentLoss.for_tap(tap, LEARNED)
        empty = student.family.encode([example("two", "the", (64, 64), "2")])
        empty.words = type(empty.words).build([], [], "predict")
        total, count = align.sums(tap, empty, torch.zeros(0, 32, 32), torch.zeros(0, dtype=torch.bool))
        total.backward()
        assert (float(total), int(count)) == (0.0, 0)
        assert all(p.grad is not None for p in align.parameters())
    path = build_mllama(tmp_path / "m", ["what is it", "a red circle"] * 3, vocabulary=320)
    crossed = load_student(ModelConfig(name="t", path=str(path)))
    with AttentionTap(crossed.model, crossed.family) as tap, pytest.raises(UserError, match="attention=learned"):
        AlignmentLoss.for_tap(tap, LEARNED)
    with pytest.raises(UserError, match="paper_compat"):
        AlignConfig(attention="learned", paper_compat=True)

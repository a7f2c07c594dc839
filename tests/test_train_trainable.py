"""What is trained: adapters on the right side, parts that join later, precision of what is trained."""

import sys

import pytest
import torch
from student_models import build_student
from torch import nn

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.student.load import load_student
from pipeline.train import status
from pipeline.train.config import LoraConfig, TrainConfig, Unfreeze
from pipeline.train.trainable import VISION, Unfreezing, quantization, trainable


def adapters(kind: str, folder, **lora) -> set[str]:
    model = load_student(build_student(kind, folder)).model
    made = trainable(model, TrainConfig(lora=LoraConfig(**lora)))
    return {name for name, p in made.named_parameters() if p.requires_grad}


def test_adapters_are_on_the_vision_side_as_asked(tmp_path):
    for kind in ("mllama", "qwen2_5_vl"):  # whose towers call their projections by the same and by another name
        made = {
            asked: adapters(kind, tmp_path / f"{kind}-{asked}", vision=asked, targets=["q_proj", "v_proj"])
            for asked in (None, True, False)
        }
        seeing = {asked: {name for name in names if VISION.search(name)} for asked, names in made.items()}
        assert made[False]
        assert not seeing[False]
        assert seeing[True]
        assert bool(seeing[None]) == (kind == "mllama")
        assert all(names - seeing[asked] == made[False] for asked, names in made.items()), "the text side is the same"


def test_a_part_that_joins_later_has_no_state_and_no_decay_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    unfreezing = Unfreezing(model.named_parameters(), [Unfreeze(2, r"^0\."), Unfreeze(9, "weight")])
    for step in range(3):
        model(torch.ones(2, 3)).square().sum().backward()
        unfreezing.drop(step)
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True)]
        # The second layer's weight waits for step 9; its bias was never held.
        assert moved == [step == 2, step == 2, False, True]
        assert [bool(optimizer.state[p]) for p in model.parameters()] == moved
    with pytest.raises(UserError, match="matches no parameter"):
        Unfreezing(model.named_parameters(), [Unfreeze(2, "0"), Unfreeze(3, "0")])


def test_trained_weights_are_float32_and_the_others_stay_as_they_are(tmp_path):
    model = load_student(build_student("mllama", tmp_path)).model.to(torch.bfloat16)
    cfg = TrainConfig(method="full", precision="bf16", freeze=["vision_model"])
    for name, parameter in trainable(model, cfg).named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "vision_model" in name else torch.float32), name


def test_four_bits_need_what_they_need_and_say_so(monkeypatch):
    assert quantization("", "full") is None
    with pytest.raises(UserError, match="method=lora"):
        quantization("nf4", "full")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'lavender-pipeline\[qlora\]'"):
        quantization("nf4", "lora")
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        quantization("nf4", "lora")


def test_later_settings_at_their_defaults_leave_old_runs_good_and_count_otherwise():
    plain = status.settings(compose([]))["train"]
    assert not {"unfreeze", "quantize", "logits_mb"} & plain.keys()
    changed = status.settings(compose(["train.unfreeze=[{step: 3, pattern: lm_head}]", "train.lora.vision=true"]))
    assert changed["train"]["unfreeze"] == [{"step": 3, "pattern": "lm_head"}]
    assert changed["train"]["lora"]["vision"] is True

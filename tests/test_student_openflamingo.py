"""OpenFlamingo: published checkpoints in and out, the arithmetic against plain loops, and the whole train stage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from student_models import FLAMINGOS, build_student, published_openflamingo
from test_student_families import TEXT, example, picture, tapped
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.examples import Example, Turn, decode
from pipeline.student.load import load_student, skeleton
from pipeline.student.openflamingo_lm import FusedAttention, text_config
from pipeline.student.openflamingo_model import OpenFlamingo, OpenFlamingoConfig

KINDS = tuple(FLAMINGOS)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Settings, and the student they load."""
    cfg = build_student(request.param, tmp_path_factory.mktemp(request.param))
    return cfg, load_student(cfg)


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    cfg = build_student("openflamingo-9b", tmp_path_factory.mktemp("nine"))
    return cfg, load_student(cfg)


def published(cfg) -> dict[str, torch.Tensor]:
    return torch.load(f"{cfg.path}/checkpoint.pt", weights_only=True)


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_fills_the_model_and_its_names_come_back(made, tmp_path):
    cfg, student = made
    trained, held = published(cfg), student.model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in trained.items())
    assert all(p.numel() and not p.is_meta for p in student.model.parameters())
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    rest = [name for name in saved if name not in trained]
    others = ("vision_encoder.", "lang_encoder.embed_out.", "lang_encoder.transformer.norm_f.", "final_layer_norm.")
    assert all(".decoder_layer." in name or any(other in name for other in others) for name in rest)
    again = load_student(replace(cfg, path=str(tmp_path)))
    batch = student.family.encode([example("two", "a small red circle", (50, 90)), TEXT])
    other = again.family.encode([example("two", "a small red circle", (50, 90)), TEXT])
    assert torch.equal(other.inputs["input_ids"], batch.inputs["input_ids"])
    for one, same in zip(tapped(student, batch), tapped(again, other), strict=True):
        assert torch.equal(one, same)


def test_the_language_models_own_weights_are_where_they_belong(made):
    """Everything that is not in the checkpoint comes from the two parts, under other names."""
    cfg, student = made
    folder = cfg.parts["language"]
    try:
        weights = load_file(f"{folder}/model.safetensors")
    except FileNotFoundError:
        weights = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
    tower = load_file(f"{cfg.parts['vision']}/model.safetensors")
    held = list(student.model.state_dict().values())
    missing = []
    for name, value in weights.items():
        if "wte" in name or "embed_in" in name:
            continue  # the checkpoint has its own
        wanted = value[: len(student.model.get_input_embeddings().weight)] if "embed_out" in name else value
        if not any(torch.equal(wanted, have) for have in held):
            missing.append(name)
    for name, value in tower.items():
        if name.startswith("vision_model.") and "post_layernorm" not in name and value.dim() > 1:
            assert any(torch.equal(value, have) for have in held), name
    assert not missing


# Trained parameters (perceiver, cross-attention, embeddings of 50,280 tokens) as docs/families.md derives them by hand
# from the shapes of the published checkpoints.
SIZES = {
    "openflamingo-3b": (("mpt", {"d_model": 2048, "n_heads": 16, "n_layers": 24}), 1, 1_046_992_944),
    "openflamingo-9b": (("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32}), 4, 1_384_781_840),
}


@pytest.mark.parametrize("kind", SIZES)
def test_real_sizes_have_the_parameters_of_the_published_shapes(kind):
    (name, sizes), every, expected = SIZES[kind]
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = OpenFlamingoConfig(
        vision_config=vision | {"image_size": 224, "patch_size": 14},
        text_config=sizes | {"model_type": name, "vocab_size": 50280},
        cross_attn_every_n_layers=every,
    )
    with torch.device("meta"):
        model = OpenFlamingo(config)
    trained = ("perceiver.", "gated_cross_attn_layer.", "transformer.wte.")
    assert sum(p.numel() for n, p in model.named_parameters() if any(part in n for part in trained)) == expected


def _save(cfg, tmp_path, weights) -> object:
    (tmp_path / "m").mkdir()
    torch.save(weights, tmp_path / "m" / "checkpoint.pt")
    return replace(cfg, path=str(tmp_path / "m"))


def test_second_names_and_old_buffers_are_left_out(tmp_path_factory, tmp_path):
    cfg = build_student("openflamingo-4b", tmp_path_factory.mktemp("four"))
    weights = published(cfg)
    more = {
        "lang_encoder.gated_cross_attn_layers.1.attn_gate": torch.ones(1),
        "lang_encoder.old_decoder_blocks.0.attention.dense.bias": torch.ones(48),
        "lang_encoder.gpt_neox.layers.0.decoder_layer.attention.masked_bias": torch.tensor(-1e9),
        "lang_encoder.gpt_neox.layers.0.decoder_layer.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    student = load_student(_save(cfg, tmp_path, weights | more))
    assert torch.equal(student.model.state_dict()["perceiver.latents"], weights["perceiver.latents"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("perceiver.layers.2.1.3.weight"), "lack 1 tensors.*perceiver.layers.2.1.3.weight"),
        (lambda w: w.pop("perceiver.latents"), "no OpenFlamingo checkpoint"),
        (lambda w: w.update({"perceiver.frame_embs": torch.ones(1, 32)}), "no place: perceiver.frame_embs"),
        (lambda w: w.update({"perceiver.norm.weight": torch.ones(31)}), "perceiver.norm.weight"),
        (
            lambda w: w.update({"lang_encoder.transformer.blocks.4.gated_cross_attn_layer.attn_gate": torch.ones(1)}),
            r"layers \[3, 4\]",
        ),
    ],
    ids=["missing", "no latents", "too many", "shape", "places"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(nine, tmp_path, change, message):
    weights = published(nine[0])
    change(weights)
    with pytest.raises(UserError, match=message):
        load_student(_save(nine[0], tmp_path, weights))


def test_parts_are_asked_for_by_name(nine, tmp_path):
    cfg = nine[0]
    with pytest.raises(UserError, match=r"model.parts.vision="):
        load_student(replace(cfg, parts={"language": cfg.parts["language"]}))
    with pytest.raises(UserError, match=r"model.parts.sound"):
        load_student(replace(cfg, parts=cfg.parts | {"sound": "x"}))
    other = tmp_path / "language"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'"):
        load_student(replace(cfg, parts=cfg.parts | {"language": str(other)}))


def test_code_that_comes_with_the_language_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    cfg = build_student("openflamingo-3b", tmp_path)
    other = Path(cfg.parts["language"])
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"asked: {text}"))
    (other / "theirs.py").write_text("raise SystemExit('their code ran')")

    def edit(name: str, **more) -> None:
        path = other / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    # As MPT-1B: a type that transformers does not know, with code for it.
    edit("config.json", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    assert load_student(cfg).processor.tokenizer.is_fast
    assert skeleton(cfg).processor.tokenizer.is_fast
    edit("tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": [None, "theirs.Theirs"]})
    for way in (load_student, skeleton):
        with pytest.raises(UserError, match=r"code that comes with it.*model\.trust_remote_code=true") as found:
            way(cfg)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("option", "value"), [("prefix_lm", True), ("alibi", False), ("no_bias", False), ("logit_scale", 0.5)]
)
def test_options_of_mpt_that_are_not_computed_are_refused(option, value):
    found = {"model_type": "mosaic_gpt", "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 9, "vocab_size": 5}
    found |= {"alibi": True, "no_bias": True}
    assert text_config(found, "m").n_layers == 2
    with pytest.raises(UserError, match=f"{option}={value}"):
        text_config(found | {option: value}, "m")


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_fused_mpt_equals_the_library_and_norms_queries_and_keys():
    from transformers import MptConfig
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    torch.manual_seed(0)
    plain = MptConfig(d_model=48, n_heads=4, n_layers=1, max_seq_len=16, attn_config={"clip_qkv": 0.7})
    reference = MptAttention(plain, 0)
    ours = FusedAttention(plain, 0)
    ours.load_state_dict(reference.state_dict())
    x_BLC, alibi = torch.randn(2, 9, 48), build_mpt_alibi_tensor(4, 16)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None].repeat(2, 1, 1, 1)
    hidden[1, :, 3:, :2] = True
    expected, _ = reference(x_BLC, alibi, attention_mask=hidden)
    torch.testing.assert_close(ours(x_BLC, alibi, attention_mask=hidden)[0], expected, atol=1e-5, rtol=1e-5)

    normed = FusedAttention(MptConfig(d_model=48, n_heads=4, n_layers=1, attn_config={"qk_ln": True}), 0)
    for norm in (normed.q_ln, normed.k_ln):
        torch.nn.init.normal_(norm.weight)
    query, key, value = normed.Wqkv(x_BLC).chunk(3, -1)
    query = functional.layer_norm(query, (48,)) * normed.q_ln.weight
    key = functional.layer_norm(key, (48,)) * normed.k_ln.weight
    query, key, value = (part.view(2, 9, 4, 12).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) / 12**0.5 + alibi[:, :, -9:]
    wanted = scores.masked_fill(hidden, -1e9).softmax(-1) @ value
    found = normed(x_BLC, alibi, attention_mask=hidden)[0]
    torch.testing.assert_close(found, normed.out_proj(wanted.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


def plain_perceiver(weights, patches_PC: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The perceiver of one image, written out, and the attention of its latents to the patches."""
    latents_QC = weights["perceiver.latents"]
    seen = torch.zeros(len(latents_QC), len(patches_PC))
    width = latents_QC.shape[1]
    for layer in range(6):
        at = {name.removeprefix(f"perceiver.layers.{layer}."): w for name, w in weights.items()}
        media = functional.layer_norm(patches_PC, (width,), at["0.norm_media.weight"], at["0.norm_media.bias"])
        normed = functional.layer_norm(latents_QC, (width,), at["0.norm_latents.weight"], at["0.norm_latents.bias"])
        query = normed @ at["0.to_q.weight"].T
        key, value = (torch.cat([media, normed]) @ at["0.to_kv.weight"].T).chunk(2, -1)
        out = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            probs = (q @ k.T * 64**-0.5).softmax(-1)
            seen += probs[:, : len(patches_PC)]
            out.append(probs @ v)
        latents_QC = latents_QC + torch.cat(out, -1) @ at["0.to_out.weight"].T
        inner = functional.layer_norm(latents_QC, (width,), at["1.0.weight"], at["1.0.bias"]) @ at["1.1.weight"].T
        latents_QC = latents_QC + functional.gelu(inner) @ at["1.3.weight"].T
    weight, bias = weights["perceiver.norm.weight"], weights["perceiver.norm.bias"]
    return functional.layer_norm(latents_QC, (width,), weight, bias), seen / seen.sum(-1, keepdim=True)


def test_perceiver_and_composed_map_equal_plain_loops(nine):
    cfg, student = nine
    one = example("What colour is the circle?", "a small red circle", (64, 64))
    batch = student.family.encode([one])
    crossed = student.family.attention_modules(student.model)[3]
    inputs = {}
    crossed.register_forward_pre_hook(lambda m, args: inputs.update(text=args[0], latents=args[1]))
    with torch.no_grad():
        patches = student.model.vision_encoder(pixel_values=batch.inputs["pixel_values"][:, 0]).last_hidden_state[0, 1:]
        latents_QC, seen_QP = plain_perceiver(published(cfg), patches, 8)
        _, maps = tapped(student, batch)
        torch.testing.assert_close(inputs["latents"][0, 0], latents_QC, atol=1e-3, rtol=1e-3)
        query = crossed.to_q(crossed.norm(inputs["text"][0])).view(-1, 8, 64).transpose(0, 1)
        key = crossed.to_kv(latents_QC).chunk(2, -1)[0].view(-1, 8, 64).transpose(0, 1)
        probs_HLQ = (query @ key.transpose(1, 2) / 8).softmax(-1)
    crossed._forward_pre_hooks.clear()
    words = batch.words
    for w in range(len(words)):
        rows = words.row_pos[words.row_word == w]
        patches_HYX = (probs_HLQ[:, rows].mean(1) @ seen_QP).view(8, 4, 4)
        # 4x4 patches on 32x32 cells, in units of an even spread
        expected = patches_HYX.repeat_interleave(8, 1).repeat_interleave(8, 2) / 64 * 1024
        torch.testing.assert_close(maps[w, 0], expected, atol=1e-3, rtol=1e-3)


def test_text_looks_at_the_last_image_before_it_and_at_none_before_the_first(nine):
    _, student = nine
    model, image = student.model, student.family.image_id
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1, 12))
    ids[0, [3, 8]] = image
    pixels = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        both = model(ids, pixel_values=pixels).logits
        other = model(ids, pixel_values=torch.stack([pixels[:, 0], torch.randn(1, 3, 32, 32)], 1)).logits
        first = model(ids, pixel_values=torch.stack([torch.randn(1, 3, 32, 32), pixels[:, 1]], 1)).logits
        alone = model(ids[:, :8], pixel_values=pixels[:, :1]).logits
        blind = model(ids[:, :3], pixel_values=torch.randn(1, 1, 3, 32, 32)).logits
    torch.testing.assert_close(both[:, :8], other[:, :8], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[:, 8:], other[:, 8:], atol=1e-2)
    assert not torch.allclose(both[:, 3:8], first[:, 3:8], atol=1e-2)
    torch.testing.assert_close(both[:, :8], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[:, :3], blind, atol=1e-4, rtol=1e-4)


def test_generation_reads_the_image_once_and_equals_whole_forwards(made):
    _, student = made
    model = student.model
    inputs = student.family.prompt(
        [example("two", "red", (50, 90)), example("List the colours.", "red", (40, 40))], [0, 0]
    )
    calls = []
    hook = model.perceiver.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=student.family.pad_id)
    hook.remove()
    assert len(calls) == 1
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(found.shape[1] - ids.shape[1]):
            more = model(ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    for row, whole in zip(found.tolist(), ids.tolist(), strict=True):
        stop = student.family.tokenizer.eos_token_id
        end = row.index(stop) if stop in row else len(row)
        assert row[:end] == whole[:end]


# --- prompts and images ---------------------------------------------------------------------------------------------


def test_prompts_have_the_published_form(nine):
    _, student = nine
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "What is it?"),
        Turn("assistant", "a circle"),
        Turn("user", "And its colour?"),
        Turn("assistant", "red"),
    )
    many = Example("0", picture(40, 40), "png", turns, "test", "train", "none")
    item = student.family.encode_one(many)
    assert student.family.tokenizer.decode(item.ids) == (
        "Be brief.\n<image>Question:What is it? Answer:a circle<|endofchunk|>"
        "Question:And its colour? Answer:red<|endofchunk|>"
    )
    learnt = item.ids[item.labels != -100]
    assert student.family.tokenizer.decode(learnt) == "a circle<|endofchunk|>red<|endofchunk|>"
    asked = student.family.prompt([many], [3])["input_ids"][0]
    assert student.family.tokenizer.decode(asked) == "Be brief.\n<image>Question:And its colour? Answer:"


def test_what_the_square_leaves_out_gets_nothing(nine):
    _, student = nine
    batch = student.family.encode([example("two", "red circle", (30, 90))])
    _, maps = tapped(student, batch)
    assert maps[..., :10].abs().max() == maps[..., 22:].abs().max() == 0  # the middle third of the width is seen
    assert maps[..., 12:20].min() > 0
    made = student.processor.image_processor([decode(picture(30, 90))], return_tensors="np")
    np.testing.assert_array_equal(batch.inputs["pixel_values"][0], made["pixel_values"])


# --- the stages -----------------------------------------------------------------------------------------------------


def stage_settings(root, kind: str, method: str) -> tuple[list[str], object]:
    """Settings of all stages for a tiny model and a tiny world under ``root``, and those of the student."""
    student = build_student(kind, root / kind)
    parts = ", ".join(f"{name}: {path}" for name, path in student.parts.items())
    settings = [
        f"shards_dir={root}/shards",
        f"runs_dir={root}/runs",
        f"model={kind}",
        f"model.path={student.path}",
        f"model.parts={{{parts}}}",
        "model.dtype=float32",
        "model.max_length=512",
        "data.sizes={train: 12, val: 4, test: 4, ood_pairs: 2, ood_count: 2, ood_background: 2}",
        "engine.workers=1",
        "arm=oracle",
        f"train.method={method}",
        "train.lora.dropout=0",
        "train.lr=0.001",
        "train.precision=no",
        "train.steps=2",
        "train.batch_size=4",
        "train.micro_batch=2",
        "train.log_every=1",
        "train.workers=0",
    ]
    return settings, student


def losses(run) -> list[dict]:
    from pipeline.train import metrics

    return metrics.read(run)


def test_the_train_stage_aligns_and_exports_under_the_published_names(tmp_path):
    from pipeline.archive.stage import shard
    from pipeline.config import compose
    from pipeline.train import status
    from pipeline.train.stage import train

    settings, student = stage_settings(tmp_path, "openflamingo-4b", "full")
    cfg = compose(settings)
    shard(cfg)
    train(cfg)  # exports, loads the export again and compares the logits
    run = status.run_dir(cfg)
    assert status.up_to_date(cfg)
    assert all(row["align"] > 0 and row["ce"] > 0 for row in losses(run))
    saved = load_file(run / "model" / "model.safetensors")
    assert set(saved) >= set(published_openflamingo("openflamingo-4b", 4, 1))
    assert not torch.equal(saved["perceiver.latents"], published(student)["perceiver.latents"])


@pytest.mark.full
def test_all_stages_with_lora_and_generated_answers(tmp_path, command):
    settings, _ = stage_settings(tmp_path, "openflamingo-3b", "lora")
    for stage in ("shard", "train", "eval"):
        result = command(stage, *settings, "eval.limit=4", cwd=tmp_path)
        assert result.returncode == 0, f"{stage}: {result.stdout}{result.stderr}"
    run = next((tmp_path / "runs").glob("*/world/oracle-1"))
    assert all(row["align"] > 0 and row["ce"] > 0 for row in losses(run))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for part in ("perceiver", "gated_cross_attn_layer", "Wqkv"):
        found = [value for name, value in adapter.items() if part in name and "lora_B" in name]
        assert found and all(value.abs().max() > 0 for value in found), part

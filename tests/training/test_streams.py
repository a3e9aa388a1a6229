"""The two streams against transformers, and the gradients they give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import MASK, make_documents, make_settings, save_documents, save_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from linocut.training.adapter import MASK_EMBEDDING
from linocut.training.attention import dense_mask
from linocut.training.network import Counts
from linocut.training.segments import Noise, clean_visibility
from linocut.training.trainer import Trainer

LENGTHS, PROMPTS = [30, 17, 40, 9, 22, 50, 12, 60] * 4, [10, 3, 20, 4, 2, 30, 5, 12] * 4


def make_trainer(folder: Path, kind: str = "llama", **changes: object) -> Trainer:
    save_model(folder / "base", kind)
    documents = make_documents(LENGTHS, PROMPTS)
    save_documents(documents, folder / "answers")
    return Trainer(make_settings(folder, **changes), documents)


def disturb(trainer: Trainer) -> None:
    """Give the adapter an effect, as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name in trainer.flat.masters():
            trainer.flat.view(trainer.flat.master, name).add_(0.05 * torch.randn(trainer.flat.masters()[name].shape))
    trainer.flat.publish()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_clean_rows_of_a_gated_model_are_the_original_model(tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(tmp_path, kind)
    disturb(trainer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").float()
    (batch,), _ = trainer.make_batches(Noise(4, False))
    network, rows = trainer.network, batch.rows
    mask = network._clean_mask.update(clean_visibility(rows, "token-causal", 1))
    with torch.no_grad():
        hidden, _ = network.run_clean(rows, trainer.decoder, network._none, mask)
        ours = hidden @ trainer.decoder.head.T
        for row, column in ((0, 0), (1, 0)):
            end = int(rows.end[row, column])
            theirs = model(rows.tokens[row : row + 1, :end]).logits[0]
            torch.testing.assert_close(ours[row, :end], theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "context", "partial"),
    [
        ("gated", "token-causal", False),
        ("gated", "token-causal", True),
        ("lora", "token-causal", False),
        ("full", "block-causal", True),
    ],
)
def test_noisy_rows_equal_one_sequence_of_both_streams_under_a_dense_mask(
    tmp_path: Path, mode: str, context: str, partial: bool
) -> None:
    """In lora and full mode all rows run the same weights, so transformers can run them as one sequence."""
    trainer = make_trainer(tmp_path, mode=mode, context=context, dtype="float64")
    if mode != "gated":
        disturb(trainer)  # gated: the fresh adapter changes nothing
    (batch,), _ = trainer.make_batches(Noise(4, partial))
    rows, segments = batch.rows, batch.segments
    network = trainer.network
    clean = clean_visibility(rows, trainer.settings.context, 4)
    with torch.no_grad():
        _, context_kv = network.run_clean(rows, network._student, network._adapters, network._clean_mask.update(clean))
        hidden = network.run_noisy(segments, context_kv, network._noisy_mask.update(segments.visibility))
        ours = hidden @ network._student.head.T

    from linocut.training.export import export

    folder = export(trainer.settings, trainer.flat.masters())
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    if mode == "gated":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").double()
    length, noisy = rows.tokens.shape[1], segments.tokens.shape[1]
    see = torch.zeros(len(rows.tokens), 1, length + noisy, length + noisy, dtype=torch.bool)
    see[:, :, :length, :length] = dense_mask(clean, length)
    see[:, :, length:] = dense_mask(segments.visibility, length + noisy)
    bias = torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, torch.finfo(torch.float64).min)
    table = model.get_input_embeddings().weight
    noisy_input = F.embedding(segments.tokens, table)
    noisy_input[segments.masked] = trainer.flat.masters()[MASK_EMBEDDING]
    with torch.no_grad():
        theirs = model(
            inputs_embeds=torch.cat([F.embedding(rows.tokens, table), noisy_input], dim=1),
            attention_mask=bias,
            position_ids=torch.cat([rows.positions, segments.positions], dim=1),
        ).logits[:, length:]
    if mode != "gated":
        # The folder keeps the mask embedding in the mask token's row, which is a row of the tied head too.
        ours[..., MASK] = theirs[..., MASK]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["gated", "lora", "full"])
def test_the_gradient_is_the_slope_of_the_loss(tmp_path: Path, mode: str) -> None:
    trainer = make_trainer(tmp_path, mode=mode, dtype="float64", kl=0.5, certainty=0.1, tv=0.2, head_chunk=64)
    disturb(trainer)
    batches, _ = trainer.make_batches(Noise(4, False))
    trainer.accumulate(batches)
    gradient = trainer.flat.gradient.clone()
    torch.manual_seed(2)
    direction = torch.randn_like(gradient)
    direction /= direction.norm()

    slope = (loss_of(trainer, batches, direction, 1e-5) - loss_of(trainer, batches, direction, -1e-5)) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-3, abs=1e-7)


def loss_of(trainer: Trainer, batches: list, direction: Tensor, step: float) -> float:
    from linocut.training.network import count_weights

    start = trainer.flat.master.clone()
    with torch.no_grad():
        trainer.flat.master.add_(step * direction)
    trainer.flat.publish()
    sums = count_weights(batches, trainer.device).clamp(min=1).double()
    with torch.no_grad():
        total = sum(float(trainer.network.forward(b, Counts(*sums), trainer.weights).loss) for b in batches)
        trainer.flat.master.copy_(start)
    trainer.flat.publish()
    return total


def test_a_gated_models_clean_stream_needs_no_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    (batch,), _ = trainer.make_batches(Noise(4, False))
    network = trainer.network
    mask = network._clean_mask.update(clean_visibility(batch.rows, "token-causal", 1))
    hidden, kept = network.run_clean(batch.rows, trainer.decoder, network._none, mask)
    assert not hidden.requires_grad
    assert not any(k.requires_grad or v.requires_grad for k, v in kept)


def test_two_micro_batches_weigh_every_row_alike(tmp_path: Path) -> None:
    small = make_trainer(tmp_path / "a", rows=1, accumulate=4, loss_share=1.0)
    batches, _ = small.make_batches(Noise(4, False))
    small.accumulate(batches)
    halves = small.flat.gradient.clone()
    weights = [float(b.segments.weight.sum()) for b in batches]
    assert len(set(weights)) > 1
    separate = torch.zeros_like(halves)
    for batch, weight in zip(batches, weights, strict=True):
        small.accumulate([batch])
        separate += small.flat.gradient * weight / sum(weights)
    torch.testing.assert_close(halves, separate, atol=1e-6, rtol=1e-4)


def test_a_share_of_the_rows_passes_the_head_once_each(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss_share=0.5, segments=[4], head_chunk=32)
    (batch,), _ = trainer.make_batches(Noise(4, False))
    assert batch.chosen is not None
    assert len(batch.chosen) == 0.5 * batch.segments.weight.numel()
    assert len(batch.chosen.unique()) == len(batch.chosen)
    output = trainer.network.forward(batch, Counts(torch.ones(()), torch.ones(())), trainer.weights)
    assert len(output.weight) == len(batch.chosen)


def test_evaluation_reports_accuracy_by_offset_and_accepted_drafts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, draft_head=True)
    record = trainer.evaluate()
    assert len(record["draft_accuracy"]) == len(record["draft_head_accuracy"]) == 8
    assert {"draft_ce", "denoise_ce", "accepted", "draft_expected"} <= set(record)
    assert record == trainer.evaluate()
    # A fresh draft head changes nothing.
    assert record["draft_head_ce"] == record["draft_ce"]


def test_the_gated_folder_keeps_the_base_and_names_the_adapter(tmp_path: Path) -> None:
    from linocut.training.export import export

    trainer = make_trainer(tmp_path, draft_head=True)
    disturb(trainer)
    folder = export(trainer.settings, trainer.flat.masters())
    original, kept = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "base", folder))
    for (name, one), (_, other) in zip(original.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    adapter = load_file(folder / "adapter.safetensors")
    expected = {"model.mask_embedding": (64,), "draft_head.input": (64, 128), "draft_head.output": (64, 64)}
    sizes = {
        "self_attn.qkv_proj": (128, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_up_proj": (256, 64),
        "mlp.down_proj": (64, 128),
    }
    for layer in range(2):
        for name, (out, inputs) in sizes.items():
            expected[f"model.layers.{layer}.{name}.adapter.down"] = (8, inputs)
            expected[f"model.layers.{layer}.{name}.adapter.up"] = (out, 8)
    assert {name: tuple(t.shape) for name, t in adapter.items()} == expected
    name = "model.layers.1.mlp.down_proj.adapter.up"
    torch.testing.assert_close(adapter[name], trainer.flat.masters()[name] * trainer.settings.scale)
    config = json.loads((folder / "config.json").read_text())
    assert config["linocut"] == {
        "context": "token-causal",
        "logit_source": "previous",
        "block_size": 4,
        "mask_token_id": MASK,
        "banned_ids": [MASK],
        "adapter": {"rank": 8, "gate": "noisy"},
    }


@pytest.mark.parametrize(
    ("kind", "layout", "source", "family", "key"),
    [
        ("qwen2", "fast-dllm-v2", "previous", "fast_dllm_v2", "bd_size"),
        ("qwen3", "sdar", "own", "sdar", "block_size"),
    ],
)
def test_a_published_layout_is_read_as_its_family(
    tmp_path: Path, kind: str, layout: str, source: str, family: str, key: str
) -> None:
    from linocut.engine.family import family_from_config
    from linocut.training.backbone import load_decoder
    from linocut.training.export import export

    trainer = make_trainer(
        tmp_path, kind, layout=layout, logit_source=source, context="block-causal", mode="full", block_size=8
    )
    disturb(trainer)
    folder = export(trainer.settings, trainer.flat.masters())
    config = json.loads((folder / "config.json").read_text())
    traits = family_from_config(config)
    assert (traits.name, traits.block_size, traits.mask_id) == (family, 8, MASK)
    assert config[key] == 8
    read = load_decoder(folder, torch.float32, torch.device("cpu"))
    trained = trainer.network._student
    assert torch.equal(read.layers[1].qkv, trained.layers[1].qkv)
    torch.testing.assert_close(read.embedding[MASK], trainer.flat.masters()[MASK_EMBEDDING])

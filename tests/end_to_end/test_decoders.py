"""Decoders of the transformers library, a step with keys and values of the tokens before it: as the library gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mcc

transformers = pytest.importorskip("transformers", reason="needs the extra models")
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 101, "max_position_embeddings": 64,
}  # fmt: skip
QUICK = {"measure": "never", "tuning": "model"}


@pytest.mark.parametrize(("kind", "more"), [
    ("Llama", {"tie_word_embeddings": True}), ("Qwen3", {"head_dim": 16}), ("Gemma2", {"head_dim": 16}),
    ("Phi3", {"pad_token_id": 0}),
])  # fmt: skip
@pytest.mark.slow
def test_decoding_token_by_token_gives_the_librarys_tokens(kind, more):
    from smollm2 import DecodeStep

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    step = DecodeStep(model).eval()
    with torch.no_grad():
        _, keys, values = step(torch.tensor([[7]]), *first_of(model, torch.tensor([[3, 9, 40]])))
    past = [{2: "past"}] * len(keys)
    artifact = mcc.compile(step, (torch.tensor([[7]]), keys, values), dynamic_shapes=({}, past, past), **QUICK)
    token, wanted = torch.tensor([[11]]), (keys, values)
    for _ in range(5):
        logits, keys, values = artifact(token, keys, values)
        with torch.no_grad():
            expected, *wanted = step(token, *wanted)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        token = logits[:, -1:].argmax(-1)
    assert keys[0].shape[2] == 9


@pytest.mark.slow
def test_decoding_with_the_cache_in_codes_follows_the_library():
    from smollm2 import DecodeStep

    from mcc.passes import QuantizeKvCache

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    step, way = DecodeStep(model).eval(), QuantizeKvCache()
    with torch.no_grad():
        _, keys, values = step(torch.tensor([[7]]), *first_of(model, torch.tensor([[3, 9, 40]])))
    past = [{2: "past"}] * len(keys)
    artifact = mcc.compile(
        step, (torch.tensor([[7]]), keys, values), passes=[way], dynamic_shapes=({}, past, past), **QUICK
    )
    assert [r.kernel for r in artifact.report.layers if r.op == "attention"] == ["attention_step"] * 2
    coded = ([way.encode_cache(part) for part in parts] for parts in (keys, values))
    token, wanted, coded = torch.tensor([[11]]), (keys, values), tuple(coded)
    for _ in range(5):
        logits, *coded = artifact(token, *coded)
        with torch.no_grad():
            expected, *wanted = step(token, *wanted)
        assert (logits - expected).norm() <= 0.02 * expected.norm()
        token = expected[:, -1:].argmax(-1)
    assert coded[0][0][0].shape[2] == 9


def first_of(model, ids):
    """Keys and values of a prompt."""
    layers = model(ids, use_cache=True).past_key_values.layers
    return [layer.keys for layer in layers], [layer.values for layer in layers]


@pytest.mark.slow
def test_smollm2_with_int8_weights_on_wikitext2(mcc_data: Path):
    """Tied embedding and head are stored once, and the file has a quarter of the bytes."""
    pytest.importorskip("gguf", reason="needs the extra models")
    from smollm2 import Logits, perplexity, smollm2, token_ids, windows

    try:
        model = Logits(smollm2()).eval()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    ids = token_ids((mcc_data / "text" / "test.txt").read_text()[:40_000])
    artifact = mcc.compile(
        model, tuple(windows(ids, 1)), passes="quantize{activations=None}", dynamic_shapes=({1: "length"},), **QUICK
    )
    found, eager = perplexity(artifact, ids, 4), perplexity(model, ids, 4)
    print(f"SmolLM2-135M, 4 windows of 512 tokens, perplexity: eager {eager:.3f}, int8 {found:.3f}")
    assert found <= eager * 1.005
    parameters = sum(p.numel() for p in model.parameters())
    assert artifact.memory.weights <= 1.05 * parameters

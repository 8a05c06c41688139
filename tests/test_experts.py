"""Mixtures of experts: rows times the matrix of their expert."""

from __future__ import annotations

import pytest
import torch

import mcc
from mcc import experts
from mcc.frontend import capture

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def test_a_rows_group_is_the_number_of_ends_before_it():
    rows, weights = torch.randn(7, 3), torch.randn(4, 3, 5)
    found = experts.grouped_matmul(rows, weights, torch.tensor([2, 2, 5, 6], dtype=torch.int32))
    wanted = [rows[i] @ weights[g] for i, g in enumerate((0, 0, 2, 2, 2, 3))]
    torch.testing.assert_close(found, torch.stack([*wanted, torch.zeros(5)]))


def test_rows_and_weights_have_gradients():
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([1, 1, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda r, w: experts.grouped_matmul(r, w, ends), (rows, weights))


@pytest.mark.parametrize(("kind", "more"), [
    ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}),
    ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention"]}),
])  # fmt: skip
def test_mixtures_of_transformers_are_captured_and_run(kind, more):
    transformers = pytest.importorskip("transformers", reason="needs the extra models")
    config = getattr(transformers, f"{kind}Config")(**SIZES | more, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model, ids = getattr(transformers, f"{kind}ForCausalLM")(config).eval(), torch.randint(3, 50, (1, 9))
    given = {"input_ids": ids, "use_cache": False}
    graph = capture(model, (), keyword_inputs=given)
    assert "mcc.grouped_matmul" in {n.op.name for n in graph.nodes}
    artifact = mcc.compile(
        model, (), keyword_inputs=given, tuning="model", measure="never", passes="quantize{activations='dynamic'}"
    )
    assert [row for row in artifact.report.layers if row.op == "mcc.grouped_matmul" and "no own kernel" in row.reason]
    with torch.no_grad():
        wanted = model(**given).logits
    assert (artifact(input_ids=ids)["logits"] - wanted).norm() < 0.1 * wanted.norm()

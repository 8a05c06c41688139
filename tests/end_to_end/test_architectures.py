"""Structured pruning is exact on whole architectures: random ratios of every group, in float64, against zeros."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from real_models import CifarResNet
from test_coupling import check_exact
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import zoo

transformers = pytest.importorskip("transformers", reason="needs the extra models")
IDS = torch.arange(14).reshape(2, 7) * 5 % 100
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 101, "max_position_embeddings": 64}
VISION = {**SMALL, "image_size": 64, "patch_size": 16}
GROUPED = {**TEXT, "num_key_value_heads": 2}
NARROW = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}


def image(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64)


class Called(nn.Module):
    """A model of the library, called so that it gives one tensor."""

    def __init__(self, model, keywords, output):
        super().__init__()
        self.model, self.keywords, self.output = model, keywords, output

    def forward(self, *inputs):
        named = dict(zip(self.keywords, inputs, strict=True))
        more = {"use_cache": False} if self.output == "logits" else {}
        return self.model(**named, **more)[self.output]


def library(kind, config, keywords=("input_ids",), output="last_hidden_state", **options):
    def build():
        made = getattr(transformers, f"{config}Config")(**options)
        return Called(getattr(transformers, kind)(made), keywords, output)

    return build


def text(kind, **options):
    return library(f"{kind}Model", kind, **(options or TEXT)), (IDS,)


def decoder(kind, **options):
    return library(f"{kind}ForCausalLM", kind, output="logits", **options), (IDS,)


def vision(kind, **options):
    return library(f"{kind}Model", kind, ("pixel_values",), **options), (image(),)


ARCHITECTURES = {
    "BERT": text("Bert"), "RoBERTa": text("Roberta"), "DeBERTa": text("DebertaV2", **TEXT, relative_attention=True,
        pos_att_type=["p2c", "c2p"]), "ALBERT": text("Albert", **TEXT, embedding_size=16), "MPNet": text("MPNet"),
    "GPT-2": (library("GPT2LMHeadModel", "GPT2", output="logits", n_embd=64, n_layer=2, n_head=4, vocab_size=101,
        n_positions=64, bos_token_id=0, eos_token_id=0), (IDS,)),
    "Llama": decoder("Llama", **GROUPED), "Mistral": decoder("Mistral", **{**GROUPED, "num_key_value_heads": 1}),
    "Qwen2": decoder("Qwen2", **GROUPED, tie_word_embeddings=True),
    "Gemma": decoder("Gemma", **GROUPED, head_dim=16), "Phi-3": decoder("Phi3", **GROUPED, pad_token_id=0, eos_token_id=0),
    "GPT-NeoX": decoder("GPTNeoX", **TEXT),
    "Mamba": decoder("Mamba", hidden_size=32, num_hidden_layers=2, vocab_size=101, state_size=4),
    "T5": (library("T5ForConditionalGeneration", "T5", ("input_ids", "decoder_input_ids"), "logits", d_model=64, d_kv=16,
        num_heads=4, d_ff=96, num_layers=2, vocab_size=101), (IDS, IDS)),
    "BART": text("Bart", **NARROW, vocab_size=101, max_position_embeddings=64),
    "ViT": vision("ViT", **VISION), "DeiT": vision("DeiT", **VISION),
    "Swin": vision("Swin", image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "ConvNeXt": vision("ConvNext", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2),
    "ResNet": vision("ResNet", **RESNET), "RegNet": vision("RegNet", **RESNET, groups_width=16),
    "SegFormer": vision("Segformer", hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, mlp_ratios=[2, 2],
        num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2]),
    "MobileViT": vision("MobileViT", image_size=64, hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96]),
    "PVT": vision("Pvt", image_size=64, hidden_sizes=[16, 32, 64, 64], depths=[1] * 4, num_attention_heads=[1, 2, 4, 4]),
    "DETR": vision("Detr", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=5,
        backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage2"]), **NARROW),
    "wav2vec 2.0": (library("Wav2Vec2Model", "Wav2Vec2", ("input_values",), **SMALL, vocab_size=101, conv_dim=(32, 32),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4),
        (torch.randn(2, 400, dtype=torch.float64),)),
    "ResNet-20": (lambda: CifarResNet(3), (image(32),)), "U-Net": (lambda: zoo.UNet(8, 2), (image(16),)),
    "EfficientNet-Lite0": (zoo.EfficientNetLite0, (image(64),)),
    "LSTM": (lambda: zoo.Recurrent(12, 16, 5), (torch.randn(2, 6, 12, dtype=torch.float64),)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_exact(name):
    build, inputs = ARCHITECTURES[name]
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) < 1e-3:  # biases and gains start at zero: nothing would show
                nn.init.normal_(parameter, 0, 0.3)
    for seed in range(2):
        assert check_exact(zoo.settled(model), inputs, seed), "nothing could go"

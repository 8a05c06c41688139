"""The peers' engines: ONNX Runtime and OpenVINO on the same model, quantized by their own tools."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from mcc.benchmark import compiled_openvino, onnxruntime_engine, openvino_engine

Engine: TypeAlias = Callable[..., Any]


def peers(
    proto: Any, calibration: list[tuple[Any, ...]], precision: str, threads: int
) -> dict[str, Callable[[], Engine]]:
    """Makers of the peers' engines."""
    if precision == "fp32":
        return {
            "ONNX Runtime": lambda: onnxruntime_engine(proto, threads),
            "OpenVINO": lambda: openvino_engine(proto, threads),
        }
    if precision == "bf16":  # ONNX Runtime's CPU kernels have none
        return {"OpenVINO": lambda: _bfloat16_openvino(proto, threads)}
    if precision == "int4":
        return {
            "ONNX Runtime": lambda: onnxruntime_engine(_int4_onnx(proto), threads),
            "OpenVINO": lambda: _int4_openvino(proto, threads),
        }
    return {
        "ONNX Runtime": lambda: onnxruntime_engine(quantized_onnx(proto, calibration), threads),
        "OpenVINO": lambda: _nncf_engine(proto, calibration, threads),
    }


def quantized_onnx(proto: Any, calibration: list[tuple[Any, ...]]) -> bytes:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [i.name for i in proto.graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(names, batch, strict=True))

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantized = (str(Path(folder) / f"{i}.onnx") for i in range(3))
        onnx.save(proto, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, quantized, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return Path(quantized).read_bytes()


def _nncf_engine(proto: Any, calibration: list[tuple[Any, ...]], threads: int) -> Engine:
    import nncf
    import openvino

    core = openvino.Core()
    model = core.read_model(proto.SerializeToString(), b"")
    batches = [b[0] if len(b) == 1 else list(b) for b in calibration]
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    return compiled_openvino(quantized, threads)


def _bfloat16_openvino(proto: Any, threads: int) -> Engine:
    import openvino

    model = openvino.Core().read_model(proto.SerializeToString(), b"")
    return compiled_openvino(model, threads, "bf16")


def _int4_onnx(proto: Any) -> bytes:
    """MatMulNBits that may round activations to int8 (accuracy level 4), which is the fastest it has."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    data: bytes = quantizer.model.model.SerializeToString()
    return data


def _int4_openvino(proto: Any, threads: int) -> Engine:
    """NNCF's weight compression; OpenVINO rounds activations to int8 by itself where that is faster."""
    import nncf
    import openvino

    model = openvino.Core().read_model(proto.SerializeToString(), b"")
    mode = nncf.CompressWeightsMode.INT4_SYM
    return compiled_openvino(
        nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, all_layers=True), threads
    )

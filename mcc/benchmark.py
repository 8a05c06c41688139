"""Timing engines against each other: interleaved, equal run counts, minimum and median."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from onnx import ModelProto

TURN_SECONDS = 0.05
QUIET_SECONDS = 0.05
FEWEST_TURNS = 5


@dataclass(frozen=True)
class Timing:
    """Times of single calls.

    Attributes:
        min_ms, median_ms: over all runs.
        runs: calls timed.
    """

    min_ms: float
    median_ms: float
    runs: int


def interleave(engines: Mapping[str, Callable[[], object]], runs: int = 200) -> dict[str, Timing]:
    """Time each engine `runs` times, in turns.

    A turn begins with a pause, in which the threads of the engine before stop spinning, and with calls that are not
    counted, until the engine's own threads have found their cores again: without them an engine on two threads is timed
    beside the busy waiting of another. Then it runs as many times in a row as fit into 50 ms, once at least and a fifth
    of all runs at most, as it would in service; the turns alternate, so that a change in the machine's speed meets all.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    most = -(-runs // FEWEST_TURNS)
    per_turn = {name: max(1, min(most, int(TURN_SECONDS / _warmed(call)))) for name, call in engines.items()}
    while any(len(t) < runs for t in times.values()):
        for name, call in engines.items():
            time.sleep(QUIET_SECONDS)
            _warmed(call)
            for _ in range(min(per_turn[name], runs - len(times[name]))):
                times[name].append(_timed(call))
    return {name: Timing(min(t) * 1e3, statistics.median(t) * 1e3, len(t)) for name, t in times.items()}


def _warmed(call: Callable[[], object]) -> float:
    """Call for 50 ms, at least twice; the least time of one."""
    started, least = time.perf_counter(), _timed(call)
    while time.perf_counter() - started < TURN_SECONDS:
        least = min(least, _timed(call))
    return max(min(least, _timed(call)), 1e-7)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def onnxruntime_engine(model: ModelProto | bytes, threads: int) -> Callable[..., list[NDArray[Any]]]:
    """An ONNX Runtime session on the CPU as a function of numpy inputs."""
    import onnxruntime  # an optional peer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: NDArray[Any]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def openvino_engine(model: ModelProto | bytes, threads: int) -> Callable[..., list[NDArray[Any]]]:
    """An OpenVINO model on the CPU, held to float32 (left to itself it computes in bfloat16 where it can)."""
    import openvino  # an optional peer

    data = model if isinstance(model, bytes) else model.SerializeToString()
    return compiled_openvino(openvino.Core().read_model(data, b""), threads)


def compiled_openvino(model: Any, threads: int, precision: str = "f32") -> Callable[..., list[NDArray[Any]]]:
    """An OpenVINO model that is already in its own form, held to a precision, as a function of numpy inputs."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(*inputs: NDArray[Any]) -> list[NDArray[Any]]:
        found = request.infer(list(inputs))
        return [np.asarray(found[i]) for i in range(len(found))]

    return run

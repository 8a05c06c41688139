"""Runs DeepSparse for sparse.py, in a Python that has it: `python -m venv there; there/bin/pip install deepsparse==1.8.0`.

Reads lines of JSON: a model to load with its input, or a number of runs to time; answers each with one line.
"""

from __future__ import annotations

import json
import os
import sys
import time

import deepsparse
import numpy as np


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine prints to the first
    engine, inputs = None, []
    for line in sys.stdin:
        asked = json.loads(line)
        times = []
        if "model" in asked:
            inputs = [np.load(asked["input"])]
            engine = deepsparse.Engine(asked["model"], batch_size=len(inputs[0]), num_cores=1)
            np.save(asked["output"], engine.run(inputs)[0])
        else:
            for _ in range(asked["runs"]):
                started = time.perf_counter()
                engine.run(inputs)
                times.append(time.perf_counter() - started)
        answers.write(json.dumps(times) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""The backends: lower an encoded graph to a library."""

from mcc.backends import cpu

BACKENDS = (cpu,)

__all__ = ["BACKENDS"]

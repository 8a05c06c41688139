"""What a user gives mcc to calibrate, train and measure with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcc.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Batch = tuple[Tensor, ...]
    Inputs = Batch | Tensor | Mapping[str, Tensor]
    Loss = Callable[[Tensor, Tensor], Tensor]
    Metric = Callable[[Callable[..., Tensor]], float]

DATA_FIELDS = ("calibration", "train", "evaluate")


@dataclass(frozen=True)
class Data:
    """Data for passes; every field is optional, and a pass that lacks one fails before any work starts.

    Attributes:
        calibration: input batches, each a tuple of the model's inputs (a single tensor counts as one input), or a dict
            of them by the names that the graph and the artifact have for them, nested ones flattened.
        train: (*inputs, labels) batches; iterated once an epoch, so a DataLoader or a list, not a generator.
        evaluate: maps a callable model to a metric, higher is better.
        loss: maps (output, labels) to a scalar; cross-entropy where it is left out.
    """

    calibration: Iterable[Inputs] | None = None
    train: Iterable[Batch] | None = None
    evaluate: Metric | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        """Refuse one batch in the place of several."""
        if isinstance(self.calibration, Mapping):
            raise DataError("data.calibration is one batch", remedy="give a list of batches")

    def lacks(self, field: str) -> bool:
        """Whether `field`, one of DATA_FIELDS, was not given."""
        return getattr(self, field) is None

    def measure(self, model: Callable[..., Tensor]) -> float:
        """The metric of a model.

        Raises:
            DataError: `evaluate` failed.
        """
        assert self.evaluate is not None
        try:
            return float(self.evaluate(model))
        except Exception as error:
            text = (str(error) or repr(error)).splitlines()[0]
            raise DataError(
                f"data.evaluate failed: {type(error).__name__}: {text}",
                remedy="it gets a model to call with the inputs of a batch, and gives a number",
            ) from error


def in_order(batch: Inputs, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The inputs of a batch, by place or by name, as a tuple in the order of `names`.

    Raises:
        DataError: the batch has other names, or is no batch.
    """
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise DataError(
                f"a calibration batch has inputs {', '.join(map(str, batch))}, and the model's are {', '.join(names)}",
                remedy="give each batch the inputs that the model was captured with, by those names",
            )
        return tuple(batch[name] for name in names)
    if hasattr(batch, "shape"):
        return (batch,)  # type: ignore[return-value]  # a tensor
    if isinstance(batch, str) or not isinstance(batch, Iterable):
        raise DataError(
            f"a calibration batch is {batch!r}", remedy="give batches as tuples of the model's inputs, or by name"
        )
    return tuple(batch)

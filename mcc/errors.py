"""The errors mcc raises: each says what is wrong, where, and the way out."""


class MccError(Exception):
    """Base of every error mcc raises on purpose.

    Args:
        message: what is wrong, in one line.
        node: the graph node concerned, as `mcc.text` prints it, with its origin.
        remedy: what the user can do about it.
    """

    def __init__(self, message: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.message]
        if self.node is not None:
            lines.append(f"  node    {self.node}")
        if self.remedy is not None:
            lines.append(f"  remedy  {self.remedy}")
        return "\n".join(lines)


class CaptureError(MccError):
    """A model could not be captured into a graph."""


class UnsupportedOpError(CaptureError):
    """A graph holds an op that is not in the op table."""


class SpecError(MccError):
    """A pass text or recipe could not be parsed, or a pass option is out of range."""


class DataError(MccError):
    """A pass needs data it was not given, or the data has the wrong form."""


class PassError(MccError):
    """A pass could not do what it was asked to."""


class VerificationError(MccError):
    """A graph or an artifact does not compute what its guarantee promises.

    Attributes:
        pass_text: the pass that broke its guarantee, or the backend stage.
        node_name: the first node whose value differs.
    """

    def __init__(
        self,
        message: str,
        *,
        pass_text: str,
        node_name: str,
        node: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, node=node, remedy=remedy)
        self.pass_text = pass_text
        self.node_name = node_name


class BackendError(MccError):
    """A backend could not lower a graph."""


class TargetError(MccError):
    """A target is unknown, or this machine lacks what it needs."""


class ArtifactError(MccError):
    """A file is not a sound artifact, or an artifact was called with inputs it cannot take."""

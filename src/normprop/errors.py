"""What can go wrong, said in one line first and then the remedy."""


class NormPropError(Exception):
    """Anything normprop refuses to do; its children name the reasons that a program may want to tell apart."""


class UnsupportedOpError(NormPropError):
    """A network holds operations without a moment rule; the message lists every one with its place.

    Attributes:
        operations: their names, sorted.
    """

    def __init__(self, message: str, operations: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.operations = operations


class TracingError(NormPropError):
    """A network's forward could not be recorded; the message says on what input, and the way around it."""


class NotFiniteError(NormPropError):
    """What was to be measured holds values that are not finite, or too large to be squared."""

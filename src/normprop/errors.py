"""What can go wrong, said in one line first and then the remedy."""


class NormPropError(Exception):
    """Anything normprop refuses to do; its children name the two reasons that a program may want to tell apart."""


class UnsupportedOpError(NormPropError):
    """A network holds operations without a moment rule; the message lists every one with its place."""


class TracingError(NormPropError):
    """torch.fx could not turn a network into a graph; the message names the line and the way around it."""

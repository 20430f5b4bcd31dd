"""The one exception of this package."""


class KernelError(ValueError):
    """A matmul or a weight that cannot be computed or packed as asked: what was given, what is allowed, what to try.

    It is raised while JAX traces, before anything is launched.
    """

"""The error of a kernel that cannot run here; exported packages carry this file as it is."""


class CannotRun(RuntimeError):
    """A kernel that does not compile, or needs more than the device has."""

"""The errors that dipnet raises on purpose; the command line prints them and exits with 2."""


class DipnetError(Exception):
    """Base of every error that dipnet raises on purpose: one line, with the remedy."""


class InputError(DipnetError, ValueError):
    """The caller's input cannot be used: a density, a name, a file, a text."""


class BackendError(DipnetError):
    """The requested kernel backend cannot serve this call."""

"""The one error class for bad input, so that the command line can tell it from our own bugs."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was given, where, what was expected
    and how to mend it; the command line prints it without a traceback and exits with status 2."""

"""The errors a user can meet. Each has its exit code; none is printed with a traceback."""


class SftError(Exception):
    """Base of all expected errors: one clear message with the cause and the remedy."""

    exit_code = 1


class InputError(SftError):
    """Bad input or configuration: a file, line, field or value that the user can correct. Exit code 2."""

    exit_code = 2


class BlockedError(SftError):
    """A blocking check failed, or an input that is not accepted was asked for. Exit code 3."""

    exit_code = 3


class Interrupted(SftError):
    """The run was stopped from outside and can be resumed by running it again. Exit code 4."""

    exit_code = 4

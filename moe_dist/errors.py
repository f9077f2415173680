"""Errors that a user can cause or meet, each with its exit code.

A `MoeDistError` carries one line: the key, file or rank concerned, the value found, and the remedy. The command line
prints that line and exits; a traceback means a bug of ours.
"""

EXIT_FAILURE = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75  # on request, after a step and with a checkpoint: restart it to resume (EX_TEMPFAIL)


class MoeDistError(Exception):
    """Base of all errors meant for the user; the process returns `exit_code`."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        """Return the message in one line, even if a name or a value that it quotes has line breaks."""
        return " ".join(super().__str__().splitlines())


class ConfigError(MoeDistError):
    """Invalid configuration, rejected before any process group forms."""

    exit_code = EXIT_REFUSED


class LaunchError(MoeDistError):
    """Job that cannot be started as requested, or whose environment does not match it."""

    exit_code = EXIT_REFUSED


class DataError(MoeDistError):
    """Corpus or tokenizer that cannot be read, downloaded or used."""

    exit_code = EXIT_REFUSED


class TrainingError(MoeDistError):
    """Run that had to stop: a loss that is not finite, or ranks that disagree."""


class CheckpointError(MoeDistError):
    """Checkpoint that is missing, damaged, untrusted, or incompatible with the configuration."""

    exit_code = EXIT_REFUSED


class OffloadError(MoeDistError):
    """Failure of a memory tier below the device; the last checkpoint is intact."""


class FileError(MoeDistError):
    """File or folder that cannot be read or written, and that nothing can replace."""


def file_error(error: OSError, folders: str = "") -> FileError | None:
    """Return the one-line error of a failed file operation; None for an error of a connection.

    Args:
        folders: folders in use, for an error without a file name, as of a write.
    """
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None:
        return None
    where = str(error.filename) if error.filename else f"a file ({folders or 'name unknown'})"
    reason = error.strerror or str(error)
    return FileError(f"{where} cannot be read or written: {reason}: free space or correct its permissions, then resume")

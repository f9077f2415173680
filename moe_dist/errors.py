"""Every error a user can cause or meet, each with the exit code a shell sees.

A `MoeDistError` carries one clear line: the key, file or rank concerned, the value found, and what would be right.
The command line prints that line and exits; a traceback is for our own mistakes only.
"""

EXIT_FAILURE = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75  # as asked, at a step's end and with a checkpoint: start it again to go on (EX_TEMPFAIL)


class MoeDistError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the process returns."""

    exit_code = EXIT_FAILURE


class ConfigError(MoeDistError):
    """A configuration that cannot work, refused before any process group forms."""

    exit_code = EXIT_REFUSED


class LaunchError(MoeDistError):
    """A job that cannot be started as asked, or whose environment does not fit it."""

    exit_code = EXIT_REFUSED


class DataError(MoeDistError):
    """A corpus or tokenizer that cannot be read, fetched or used."""

    exit_code = EXIT_REFUSED


class TrainingError(MoeDistError):
    """A run that had to stop: a loss that is not finite, a rank that disagrees with the others."""


class CheckpointError(MoeDistError):
    """A checkpoint that is missing, damaged, hostile, or does not fit the configuration."""

    exit_code = EXIT_REFUSED


class OffloadError(MoeDistError):
    """Experts that could not be kept or found in a tier below the device; the last checkpoint is untouched."""

"""Mutation of one place in the package, and the tests that should fail under it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Exact replacement of a text that occurs once in a file.

    Attributes:
        name: fault in a few words.
        file: path below `moe_dist/`.
        tests: pytest's arguments in a shell's syntax: the fastest tests that should fail.
    """

    name: str
    file: str
    original: str
    replacement: str
    tests: str

    def applied(self, text: str) -> str:
        """Return the file's text with the mutation.

        Raises:
            ValueError: the original text does not occur exactly once: the mutation is out of date.
        """
        found = text.count(self.original)
        if found != 1 or self.original == self.replacement:
            raise ValueError(f"{self.file}: {self.name}: occurs {found} times, not once: {self.original!r}")
        return text.replace(self.original, self.replacement)

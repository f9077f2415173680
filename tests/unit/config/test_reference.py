"""docs/keys.md says what the code says."""

from pathlib import Path

from moe_dist.config.reference import keys_reference

KEYS = Path(__file__).parents[3] / "docs" / "keys.md"


def test_the_committed_reference_is_that_of_the_code() -> None:
    assert KEYS.read_text(encoding="utf-8") == keys_reference(), "run `make docs`"


def test_values_defaults_and_meanings_are_told() -> None:
    lines = keys_reference().splitlines()
    assert "| `seed` | integer (at least 0) | `0` | " in "\n".join(lines)
    assert any(line.startswith('| `moe.balance` | `bias`, `aux_loss`, `none` | `"bias"` |') for line in lines)
    assert any(line.startswith("| `corpus.paths` | list of string |") for line in lines)
    assert any("| `world.data` | integer (at least 1) or null | `null` |" in line for line in lines)
    assert not [line for line in lines if line.startswith("| `") and line.endswith("|  |")], "every key has a meaning"

"""Mutations of `make mutants` still apply: each text occurs once in its file, and its tests exist."""

import shlex
from pathlib import Path

import pytest

from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_enough_of_every_package() -> None:
    packages = [mutation.file.split("/")[0] for mutation in MUTATIONS]
    assert len(MUTATIONS) >= 100
    for package in ("moe", "dispatch", "recluster", "memory", "metrics", "checkpoint", "engine"):
        assert packages.count(package) >= 10, package
    assert len({(mutation.file, mutation.original, mutation.replacement) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation: Mutation) -> None:
    text = (ROOT / "moe_dist" / mutation.file).read_text(encoding="utf-8")
    compile(mutation.applied(text), mutation.file, "exec")
    for test in shlex.split(mutation.tests):
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), f"{file} does not exist"
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8") if name else True, test

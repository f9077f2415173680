"""The words of an evaluation: which tasks, and options that reach the ranks as they were given."""

from pathlib import Path

import pytest

from moe_dist.errors import LaunchError
from moe_dist.evaluation.spec import EvalSpec, parse_tasks, split_overrides
from moe_dist.launch.options import from_json, to_json


def test_options_reach_a_rank_as_they_were_given() -> None:
    spec = EvalSpec(Path("runs/a"), ("wikitext", "glue:cola"), Path("/a file.txt"), stride=7, epochs=0.5, max_train=3)
    assert from_json(EvalSpec, to_json(spec)) == spec
    with pytest.raises(LaunchError, match=r"--options '\{\}': .*run Field required"):
        from_json(EvalSpec, "{}")


def test_tasks_are_named_one_by_one_or_all() -> None:
    assert parse_tasks(["glue:cola,sst2", "wikitext", "glue:cola"]) == ("glue:cola", "glue:sst2", "wikitext")
    assert parse_tasks(["glue"]) == ("glue",)
    for word in ("glue:", "glue:cola,", "wikitext:cola", "squad", ""):
        with pytest.raises(LaunchError, match="give held-out, wikitext, glue, glue:TASK,TASK of cola, sst2"):
            parse_tasks([word])


def test_only_how_ranks_work_can_be_set() -> None:
    words = ["world.threads=2", "memory.offload=true"]
    assert split_overrides(words) == (words[:1], (words[1],))
    with pytest.raises(LaunchError, match=r"'moe.rank=3': an evaluation takes the model as it was trained"):
        split_overrides(["world.threads=2", "moe.rank=3"])

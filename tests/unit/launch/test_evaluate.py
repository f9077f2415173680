"""The words of an evaluation: which tasks, and options that reach the ranks as they were given."""

import pytest

from moe_dist.errors import LaunchError
from moe_dist.launch.rank_evaluate import EvalOptions, only_of_the_job, parse, parse_tasks


def test_options_reach_a_rank_as_they_were_given() -> None:
    options = EvalOptions(tasks=("wikitext", "glue:cola"), text="/a file.txt", stride=7, epochs=0.5, max_train=3)
    run, overrides, read = parse(["runs/a", "world.threads=1", *options.words(), "--local_rank=1"])
    assert (run, overrides, read) == ("runs/a", ["world.threads=1"], options)
    assert parse(["runs/a"])[2] == EvalOptions()


def test_tasks_are_named_one_by_one_or_all() -> None:
    assert parse_tasks(["glue:cola,sst2", "wikitext", "glue:cola"]) == ("glue:cola", "glue:sst2", "wikitext")
    assert parse_tasks(["glue"]) == ("glue",)
    for word in ("glue:", "glue:cola,", "wikitext:cola", "squad", ""):
        with pytest.raises(LaunchError, match="give wikitext, glue or glue:TASK,TASK of cola, sst2"):
            parse_tasks([word])


def test_only_how_ranks_work_can_be_set() -> None:
    words = ["world.threads=2", "memory.offload=true"]
    assert only_of_the_job(words) == words
    with pytest.raises(LaunchError, match=r"'moe.rank=3': an evaluation takes the model as it was trained"):
        only_of_the_job(["world.threads=2", "moe.rank=3"])

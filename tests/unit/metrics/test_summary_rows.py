"""Rows and warnings of the features at work; a feature that is not used has no row."""

from typing import Any

from moe_dist.metrics.summary_rows import costly, summary_rows
from tests.unit.metrics.example import summary

CONVERSION = {"step": 40, "seconds": 2.0, "bytes": 9, "loss_before": 5.25, "loss_after": 5.5}


def busy() -> dict[str, Any]:
    """A run with every feature, whose figures are easy to recompute."""
    tree = summary()
    tree["load"]["dropped"] = 0.122
    tree["capacity"] = {"factor": 1.25}
    tree["conversion"] = CONVERSION | {"output_error": 0.3, "output_error_largest": 0.81}
    tree["pipeline"] = {"idle": 0.25}
    tree["data"] = {"wait_share": 0.06, "sources": {}}
    tree["recluster"] |= {"relocation_bytes": 1024, "rejected_experts": 3}
    tree["all_to_all"] |= {"flat_bytes_per_token_layer": 512.0, "wire_dtype": "int8"}
    tree["memory"] |= {
        "offload": {"peak_device_bytes": 2**20, "bytes_in": 290 * 2**20, "bytes_out": 162 * 2**20, "updates": 10}
        | {"deferred_updates": 5, "longest_behind": 7},
        "offloadable_bytes": 2**21,
    }
    return tree


def test_a_row_for_each_feature() -> None:
    plain, rows = dict(summary_rows(summary())), dict(summary_rows(busy()))
    assert rows.keys() - plain.keys() == {"conversion", "capacity", "pipeline", "offload"}
    assert rows["conversion"] == (
        "after step 40: outputs of experts changed by 0.30 (largest 0.81), the loss from 5.2500 to 5.5000, in 2.0 s"
    )
    assert rows["capacity"] == "1.25 times a uniform share; 12.20% of the copies dropped"
    assert rows["pipeline"] == "stages idle for 25.0% of their passes"
    assert rows["regrouping"] == (
        "2 rounds moved 9 experts to other clusters (3 rejected): 120.6 KiB between ranks in 0.5 s, of that 1.0 KiB "
        "for clusters that changed ranks"
    )
    assert rows["offload"] == (
        "at most 1.0 MiB of 2.0 MiB of a rank's clusters in memory; 290.0 MiB fetched, 162.0 MiB evicted; 50.0% of "
        "updates deferred, for up to 7 steps"
    )
    assert rows["all-to-all"].endswith("vectors sent as int8")
    assert rows["speed"] == "14,321 tokens/s, 3,580 for each device; 6.0% of the time waited for data"


def test_the_times_of_a_resumed_run_are_those_of_its_last_job() -> None:
    tree = summary() | {"seconds": 50.0, "first_step_seconds": 9.0}
    tree["wall_seconds"] = {"start": 6.0, "prepare": 2.0, "train": 60.0, "end": 1.0}
    assert dict(summary_rows(tree))["time"] == (
        "69.0 s: start 6.0, prepare 2.0, train 60.0, end 1.0; first step done after 9.0 s"
    )
    tree["wall_seconds"]["train"] = 20.0
    assert dict(summary_rows(tree))["time"].startswith("29.0 s since it was resumed: start 6.0")


def test_what_is_costly_is_a_warning() -> None:
    assert list(costly(summary())) == []
    found = list(costly(busy()))
    assert [words.partition(":")[0] for words in found] == [
        "12.2% of the copies of tokens were dropped",
        "the conversion of the standard warm-up changed the experts' outputs by 30%",
        "pipeline stages were idle for 25% of their passes",
        "steps waited for their data for 6% of their time",
        "more bytes between ranks than flat routing would send (768 B, 512 B)",
    ]

"""Tasks of GLUE: their columns, labels and metrics (Wang et al. 2018, table 1).

The diagnostic set is left out, since its labels are not public; so are those of the test splits. Figures are of the
validation splits, as everywhere in the literature.
"""

from dataclasses import dataclass

STS_B_HIGHEST = 5.0


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        columns: names of the sentence columns, as in the hub's data set `glue`.
        labels: number of classes; None: a number from 0 to 5.
        metrics: names in `glue_metrics.py`; the task's score is their mean.
        validation: name of the split -> suffix of its metrics' names.
    """

    name: str
    columns: tuple[str, ...]
    labels: int | None
    metrics: tuple[str, ...]
    validation: tuple[tuple[str, str], ...] = (("validation", ""),)


_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), 2, ("matthews",)),
        GlueTask("sst2", ("sentence",), 2, ("accuracy",)),
        GlueTask("mrpc", _PAIR, 2, ("f1", "accuracy")),
        GlueTask("stsb", _PAIR, None, ("pearson", "spearman")),
        GlueTask("rte", _PAIR, 2, ("accuracy",)),
        GlueTask("wnli", _PAIR, 2, ("accuracy",)),
        GlueTask("qnli", ("question", "sentence"), 2, ("accuracy",)),
        GlueTask("qqp", ("question1", "question2"), 2, ("f1", "accuracy")),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            3,
            ("accuracy",),
            (("validation_matched", "_matched"), ("validation_mismatched", "_mismatched")),
        ),
    )
}

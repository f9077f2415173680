"""Registry of the tasks that ranks can run: training, and every command of `moe-dist` that works on several ranks.

Functions and options are named here and imported only when they are needed. This is the one place where the launch
package refers to packages above it: a task starts after its configuration was accepted.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

TRAIN, TRAFFIC, EVALUATE, HARNESS, DOCTOR = "train", "traffic", "evaluate", "evaluate-lm-eval", "doctor"
BENCH_LAYER, BENCH_STEP = "bench-layer", "bench-step"
STORE_LOGITS, IMPORT = "store-logits", "import"


@dataclass(frozen=True)
class RankTask:
    """Work that every rank of a job takes part in.

    Attributes:
        function: `module:name`. Called with the configuration, and with the options if there are any; a true result
            means that the task stopped before its end because a signal asked for it.
        options: `module:name` of the dataclass of its options, in a module without torch; None: no options.
        needs_config: CONFIG is required; otherwise the defaults are used, fitted to the number of ranks.
    """

    function: str
    options: str | None = None
    needs_config: bool = False


TASKS = {
    TRAIN: RankTask("moe_dist.training.trainer:train", needs_config=True),
    TRAFFIC: RankTask(
        "moe_dist.benchmarks.traffic.measure:measure_traffic",
        "moe_dist.benchmarks.traffic.spec:TrafficSpec",
        needs_config=True,
    ),
    BENCH_STEP: RankTask(
        "moe_dist.benchmarks.step.bench:bench_step", "moe_dist.benchmarks.step.spec:StepBenchSpec", needs_config=True
    ),
    BENCH_LAYER: RankTask(
        "moe_dist.benchmarks.layer.on_ranks:bench_ranks", "moe_dist.benchmarks.layer.spec:RanksBenchSpec"
    ),
    STORE_LOGITS: RankTask(
        "moe_dist.distillation.store:store_logits", "moe_dist.distillation.spec:StoreSpec", needs_config=True
    ),
    IMPORT: RankTask(
        "moe_dist.integrations.huggingface.import_model:import_on_ranks",
        "moe_dist.integrations.huggingface.import_spec:ImportSpec",
    ),
    EVALUATE: RankTask("moe_dist.evaluation.evaluate:run_evaluation", "moe_dist.evaluation.spec:EvalSpec"),
    HARNESS: RankTask("moe_dist.integrations.lm_eval:run_with_harness", "moe_dist.evaluation.spec:EvalSpec"),
    DOCTOR: RankTask("moe_dist.doctor.checks:examine"),
}


def resolve(name: str) -> Any:
    """Import what `module:name` refers to."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)

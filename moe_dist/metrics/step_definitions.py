"""Definitions of the figures of `metrics.jsonl` and `load.jsonl`, by key, as docs/metrics.md shows them."""

STEPS: dict[str, str] = {
    "`tokens`": "tokens trained on up to this step",
    "`tokens_per_second`": "tokens of a step / mean time of the last `train.log_every` steps",
    "`tokens_per_second_per_device`, `model_flops_utilization`": (
        "the same for each rank; and as FLOPs of the model (three times the forward pass, without "
        "recomputation) over the device's 16-bit peak, where that is known "
        "(`moe_dist/config/device_peaks.py`): never on a CPU"
    ),
    "`train.loss`": "mean cross-entropy of this step's global batch, nats per token",
    "`train.sources.NAME`": (
        "with `corpus.kind=blend`: mean loss of the source's targets since the last logged step, nats per "
        "target; left out if none was drawn"
    ),
    "`data_wait_seconds`": "time that this step waited for its batch on rank 0",
    "`train.learning_rate`": "learning rate of this step",
    "`train.teacher_divergence`": (
        "with `distill.teacher`: KL divergence from the teacher at `distill.temperature`, nats a target; "
        "`train.loss` is then the loss of the text alone, and what is minimized is their mixture "
        "(`distill.weight`)"
    ),
    "`train.balance_loss`, `train.z_loss`": (
        "losses added to `train.loss` with `moe.balance=aux_loss` and with `moe.z_loss_weight`: weighted, "
        "summed over layers and stages, mean over the ranks' micro-batches"
    ),
    "`train.gradient_norm`": (
        "L2 norm of the whole gradient over all ranks, before clipping; `null` in a skipped step (float16)"
    ),
    "`train.pipeline_idle`": (
        "with `world.pipeline` > 1: share of the time of a step's passes in which a rank computed nothing "
        "(bubble, messages), mean over ranks"
    ),
    "`train.loss_scale`, `train.skipped_steps`": (
        "with float16: the loss scale after this step, and the number of steps skipped so far"
    ),
    "`load.*`": "balance of this step, defined as above",
    "`memory.rss_bytes_max`, `memory.rss_bytes_min`": (
        "the largest and the smallest resident set of a rank at this moment (VmRSS of Linux)"
    ),
    "`memory.device_bytes_max`": (
        "the most that torch has allocated on the accelerator of a rank at this moment; 0 on a CPU"
    ),
    "`offload.*`": (
        "with `memory.offload`: the figures of `memory.offload` in the summary, since the start of the process"
    ),
    "`validation.loss`, `validation.perplexity`": "on the line of an evaluation",
    "`validation.sources.NAME`": "validation loss of each source of a blend, on the same line",
}
"""Definitions of `metrics.jsonl`."""

LOADS: dict[str, str] = {
    "`steps`": "steps since the previous line, this one included",
    "`experts`": "copies routed to each expert in these steps, over all ranks: a list for each layer",
    "`clusters`, `ranks`": (
        "the same copies by cluster (`clustered` only) and by place in the expert-parallel group, by where "
        "each expert was then"
    ),
    "`load`": "the figures of balance of this step alone, as in `metrics.jsonl`",
    "`behind`": (
        "with `memory.offload`: deferred updates of each cluster at this moment, a list for each layer: for "
        "how many steps it has had no token"
    ),
}
"""Definitions of `load.jsonl`."""

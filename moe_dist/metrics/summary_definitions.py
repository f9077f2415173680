"""Definitions of the figures of `summary.json`, by key, as docs/metrics.md shows them."""

SUMMARY: dict[str, str] = {
    "`name`, `kind`": "`name` and `moe.kind` of the configuration",
    "`steps`": "optimizer steps done",
    "`tokens`": "tokens trained on = steps x `train.global_batch_size` x `model.sequence_length`",
    "`seconds`": "time in steps, summed over them; evaluations and start-up are left out",
    "`first_step_seconds`": (
        "from the start of the job on rank 0's machine (`moe-dist launch`, else rank 0's process; imports "
        "included) to the end of the first update it made; of the last job if the run was resumed, `null` if "
        "that made none or if the start time is not available"
    ),
    "`wall_seconds`": (
        "wall time of the last job by phase: `start` (processes, imports, rendezvous), `prepare` (data, "
        "model, checkpoint), `train` (steps, evaluations, re-clustering, checkpoints), `end` (up to the "
        "summary)"
    ),
    "`validation.loss`": "mean cross-entropy over the held-out tokens at the last evaluation, nats per token",
    "`validation.perplexity`": "exp(`validation.loss`)",
    "`teacher.before`, `teacher.after`": (
        "with `distill.teacher`: `loss`, the teacher's own `teacher_loss`, and the `divergence` from it on "
        "the validation sequences, before the first step and after the last; also the event `teacher`"
    ),
    "`validation.loss_stored`": (
        "validation loss with experts quantized as stored: bases rounded, factors in few bits (`precision`); "
        "equal to `validation.loss` with `qat`; `null` with `precision.residuals=none`"
    ),
    "`validation.curve`": "list of `{step, tokens, loss}`, one for each evaluation, in order",
    "`validation.curve[].sources`": (
        "with `corpus.kind=blend`: the validation loss of each source; `validation.loss` is their mean by "
        "`corpus.sources.NAME.weight`, whatever `corpus.schedule` says, so that a curve compares"
    ),
    "`data.wait_seconds`, `data.wait_share`": (
        "time that rank 0's steps waited for their batch, which a thread reads ahead, since the start of the "
        "process; and its share of `seconds`"
    ),
    "`data.packing`": "`corpus.packing`",
    "`data.sources.NAME.sequences`, `.tokens`, `.epochs`": (
        "sequences drawn from each source over the run, the same in tokens (padding included) and in passes "
        "over it; NAME is `corpus` without a blend"
    ),
    "`data.sources.NAME.validation_loss`": "last validation loss of a blend's source; `null` without a blend",
    "`data.sources.NAME.padding`, `.cut_documents`": (
        "with `corpus.packing=best_fit`: share of the ids of its sequences that are padding, and of its "
        "documents that are longer than a sequence"
    ),
    "`tokens_per_second`": (
        "tokens of the steps / time in these steps, over all ranks; the first step, which warms up, is left out"
    ),
    "`tokens_per_second_per_device`, `model_flops_utilization`": "as in `metrics.jsonl`, for the whole run",
    "`loss_scale.scale`, `loss_scale.skipped_steps`": (
        "last loss scale, and steps that were skipped because gradients overflowed; `loss_scale` is `null` "
        "unless `train.precision` is float16"
    ),
    "`parameters.total`": "parameters of the whole model, each counted once however many ranks hold it",
    "`parameters.expert`": (
        "those of them in experts: bases, low-rank factors and vectors of all clusters, or whole experts; "
        "routers are left out"
    ),
    "`parameters.expert_standard`": (
        "parameters of E standard SwiGLU experts of the same width: L x E x 3 x `model.hidden_size` x "
        "`moe.expert_hidden`"
    ),
    "`all_to_all.bytes`": (
        "sum over ranks, layers, training steps, forward and backward, of the bytes (`numel x element_size`) "
        "that a rank sends to *other* ranks in an all-to-all; the part for itself is left out, and so are "
        "evaluations"
    ),
    "`all_to_all.bytes_inter_node`": "the part of it whose receiver is on another machine",
    "`all_to_all.bytes_per_token_layer`": "`all_to_all.bytes` / (`tokens` x L)",
    "`all_to_all.flat_bytes_per_token_layer`": (
        "expected for flat top-k routing of the same tokens over the ranks that hold all experts once "
        "(`moe_dist/dispatch/layout_advice.py`); `null` for a dense model"
    ),
    "`all_to_all.hidden_bytes_per_token_layer`": (
        "the same for hidden vectors and their gradients alone, without counts and routing data"
    ),
    "`all_to_all.wire_dtype`": "`moe.wire_dtype`; `null` for a dense model",
    "`all_to_all.messages`": "non-empty messages between different ranks, summed over the same collectives",
    "`all_to_all.bytes_by_payload`, `all_to_all.bytes_by_direction`": (
        "the same bytes by payload (`hidden`: token vectors and results; `routing`: scores and gates; "
        "`counts`: numbers of rows), and by `forward` and `backward` pass"
    ),
    "`collectives.<purpose>.bytes_per_step`, `.bytes_per_step_inter_node`": (
        "bytes that all ranks send in a training step beside the all-to-alls of experts, and those between "
        "nodes: `tensor` (tokens gathered and sums scattered around divided attention), `context` (Ulysses), "
        "`pipeline` (hidden states, gradients, a tied embedding), `reduction` (gradients, and ZeRO's "
        "weights). Formulas (`moe_dist/model/collective_bytes.py`), which "
        "`tests/distributed/test_collective_bytes.py` holds against every collective of a step, to 1 % in "
        "each pair of ranks; rings send to the next rank; norms and statistics are left out"
    ),
    "`load.variance`": "Var_e(s_e) of the shares s_e = n_e / sum_e(n_e); in share squared, 0 is perfect balance",
    "`load.cv2`": (
        "Var_e(n_e) / mean_e(n_e)^2 = E^2 x variance; dimensionless, so that models with different E compare"
    ),
    "`load.max_over_mean`": ("max_e(n_e) / mean_e(n_e); the busiest expert's work over a uniform share, from 1 to E"),
    "`load.entropy`": "-sum_e(s_e ln s_e) / ln E; 1 is perfect balance, 0 is everything on one expert",
    "`load.dropped`": "share of routed copies beyond the capacity; 0 without `moe.capacity_factor`",
    "`load.cluster.*`": "variance, cv2, max_over_mean and entropy of the copies per cluster, for `clustered`",
    "`load.rank.*`": ("the same for ranks: places in the expert-parallel group, each summed over the `data` replicas"),
    "`stored.expert_bytes`, `stored.residual_bytes`, `stored.float32_bytes`": (
        "all clusters of the model as an export would store them (`precision`), their residuals in it, and what "
        "they take in float32; `stored` is `null` without `precision.residuals`"
    ),
    (
        "`recluster.rounds`, `recluster.moved_experts`, `recluster.rejected_experts`, `recluster.bytes`, "
        "`recluster.relocation_bytes`, `recluster.seconds`"
    ): (
        "rounds of re-clustering, and sums over them of the fields of `recluster` events (`rejected_experts`: "
        "of `dropped_experts`); 0 without"
    ),
    "`conversion.*`": (
        "with `moe.warmup_standard`: `step`, `seconds`, `bytes`, `loss_before`, `loss_after`, `output_error`, "
        "`output_error_largest` of the event `clustered`; else `null`"
    ),
    "`capacity.factor`": "`moe.capacity_factor`",
    "`pipeline.idle`": "mean of `train.pipeline_idle` over the steps of this process; `null` without stages",
    "`memory.peak_rss_bytes`": (
        "largest resident set of any rank's process (VmHWM of Linux): weights, optimizer, libraries and all else"
    ),
    "`memory.peak_rss_bytes_by_rank`": "the same for each rank, in order",
    "`memory.model_bytes`": (
        "weights, gradients and training state of rank 0, counted from tensors and blocks on all tiers"
    ),
    "`memory.offloadable_bytes`": "the part of it that is kept in tiers; 0 without `memory.offload`",
    "`memory.device_bytes`": (
        "`memory.model_bytes` - `memory.offloadable_bytes` + `memory.offload.peak_device_bytes`: the most of "
        "them on the device at once"
    ),
    "`memory.dense_bytes`": (
        "the same for a dense model of the active width (`moe.dense_hidden` or top_k * expert_hidden) at the "
        "same ZeRO stage and precision, on one rank"
    ),
    "`memory.offload.budget_bytes`, `memory.offload.peak_device_bytes`": (
        "budget of a rank, and the largest amount that any rank had on the device at once; `memory.offload` "
        "is `null` without offloading"
    ),
    "`memory.offload.bytes_in`, `memory.offload.bytes_out`": (
        "bytes of blocks that all ranks fetched to the device and evicted, evaluations included"
    ),
    "`memory.offload.updates`, `memory.offload.deferred_updates`": (
        "updates of offloaded clusters, summed over clusters, steps and ranks, and those of them that were "
        "deferred because the cluster had no token (`memory.lazy_updates`)"
    ),
    "`memory.offload.clusters_behind`, `memory.offload.longest_behind`": (
        "clusters of all ranks with deferred updates at this moment, and the most updates that were deferred "
        "in succession: the steps for which a cluster stayed away"
    ),
    "`memory.peak_device_bytes`": "most that torch had allocated on the accelerator of any rank; 0 on a CPU",
    "`world.data`, `world.cluster`, `world.shard`": "sizes of the experts' axes; R is their product",
    "`world.replicas`, `world.sliced`": (
        "neighbors of the data axis that hold the same clusters (`world.shard_mode=replicate`), and whether "
        "the shard axis slices experts (`slice`)"
    ),
    "`world.pipeline`, `world.chunks`": (
        "pipeline stages of D x C x S ranks each, and chunks of layers of a stage (`world.virtual_pipeline`)"
    ),
    "`world.tensor`, `world.context`": (
        "ranks that divide attention and sequences; R / (pipeline x tensor x context) groups divide the batch"
    ),
    "`device`": "device of rank 0, which stands for all: name, and on a CPU the threads of a rank",
    "`seed`": "`seed` of the configuration",
    "`versions`": (
        "of `python`, `moe-dist`, `torch`, `deepspeed` and `megatron-core`; `null` where one is not installed"
    ),
}
"""Definitions of `summary.json`."""

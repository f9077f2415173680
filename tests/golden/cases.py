"""Golden runs: ranks and overrides of `configs/test/smoke.yaml` for each feature of the system."""

COMMON = ("tensorboard=false", "moe.overlap_chunks=1", "checkpoint.asynchronous=false")
RECLUSTER = (
    "recluster.period=2",
    "recluster.start=2",
    "recluster.growth=1",
    "recluster.threshold=0",
    "recluster.max_loss_increase=1e9",
)
RANDOM = (*RECLUSTER, "recluster.similarity=random")
SHARDS = ("world.shard=2", "world.shard_mode=experts")
GOOD = ("moe.top_clusters=2",)
BF16 = ("train.precision=bfloat16",)

CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "top-1 on 1": (1, ()),
    "top-1 on 2": (2, ("world.cluster=2",)),
    "top-1 on 4": (4, ("world.cluster=4",)),
    "top-1, two clusters a rank, ZeRO 0": (2, ("world.zero_stage=0", "world.cluster=2")),
    "top-1, data 2, ZeRO 2": (4, ("world.cluster=2", "world.data=2", "world.zero_stage=2")),
    "top-1, shard 2": (4, ("world.cluster=2", *SHARDS)),
    "top-1, two chunks": (2, ("world.cluster=2", "moe.overlap_chunks=2")),
    "top-1, int8 wire": (2, ("world.cluster=2", "moe.wire_dtype=int8")),
    "top-1, bfloat16": (2, ("world.cluster=2", *BF16)),
    "top-1, accumulation": (2, ("world.cluster=2", "train.micro_batch_size=4")),
    "top-1, recomputation": (2, ("world.cluster=2", "model.activation_checkpointing=true")),
    "top-2 on 1": (1, GOOD),
    "top-2 on 2": (2, (*GOOD, "world.cluster=2")),
    "top-2, shard 2": (4, (*GOOD, "world.cluster=2", *SHARDS)),
    "top-2, two chunks": (2, (*GOOD, "world.cluster=2", "moe.overlap_chunks=2")),
    "standard, bias": (2, ("moe.kind=standard",)),
    "standard, auxiliary loss": (4, ("moe.kind=standard", "moe.balance=aux_loss", "moe.z_loss_weight=0.001")),
    "standard, capacity": (2, ("moe.kind=standard", "moe.capacity_factor=1.0")),
    "standard, shared expert": (2, ("moe.kind=standard", "moe.shared_expert_hidden=32")),
    "dense": (2, ("moe.kind=dense",)),
    "clustered, auxiliary loss": (2, ("moe.balance=aux_loss", "moe.z_loss_weight=0.001", "world.cluster=2")),
    "capacity": (2, ("moe.capacity_factor=1.0", "world.cluster=2")),
    "capacity, top-2": (4, (*GOOD, "moe.capacity_factor=1.0", "world.cluster=2", *SHARDS)),
    "adopt, by similarity": (2, (*RECLUSTER, "world.cluster=2")),
    "adopt, shard 2": (4, (*RANDOM, "world.cluster=2", *SHARDS)),
    "adopt, by random": (4, (*RANDOM, "world.cluster=4")),
    "refit": (2, (*RANDOM, "recluster.transition=refit", "world.cluster=2")),
    "relocation": (
        2,
        (
            *GOOD,
            *RECLUSTER,
            "moe.clusters=8",
            "world.cluster=2",
            "recluster.relocate=true",
            "recluster.max_moved=0.125",
        ),
    ),
    "guard": (2, (*RANDOM, "recluster.max_loss_increase=0", "world.cluster=2")),
    "quantization-aware": (2, ("precision.residuals=qat", "precision.group_size=32", "world.cluster=2")),
    "stored at the end": (2, ("precision.residuals=post", "precision.group_size=32", "world.cluster=2")),
    "offload": (2, ("memory.offload=true", "memory.device_budget_bytes={budget}", "world.cluster=2")),
    "offload, adopt": (
        2,
        (
            *RANDOM,
            "memory.offload=true",
            "memory.device_budget_bytes={budget}",
            "world.cluster=2",
            "world.zero_stage=2",
        ),
    ),
    "warm-up": (2, ("moe.warmup_standard=0.5", "world.cluster=2")),
    "reference kernel": (1, ("moe.backend=reference",)),
    "masked kernel": (1, ("moe.backend=masked",)),
    "sorted kernel": (1, ("moe.backend=sorted",)),
}

OLD_WORDS = {
    "recluster.transition=refit": "recluster.transition=refactor",
    "memory.device_budget_bytes=100000": "memory.device_budget=100000",
    "moe.backend=reference": "moe.form=reference",
    "moe.backend=masked": "moe.form=mask",
    "moe.backend=sorted": "moe.form=sort",
}
"""Overrides as the code before the renaming understood them."""

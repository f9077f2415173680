"""Figures of a run's summary as rows of words: a row for each feature at work, and warnings of what is costly."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.metrics.summary import look_up

MISSING = "-"
Summary = Mapping[str, Any]
MOST_DROPPED, MOST_CONVERSION_ERROR, MOST_IDLE, MOST_WAIT = 0.01, 0.1, 0.2, 0.05
"""Shares beyond which a figure is a warning: dropped copies, relative error of outputs, idle time, wait for data."""


def summary_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield name and words of every row; a feature that is not used has none, a missing figure is a dash."""
    yield "ranks", _world(summary)
    yield "speed", _speed(summary)
    if (first := look_up(summary, "first_step_seconds")) is not None:
        phases = _phases(look_up(summary, "wall_seconds") or {}, summary.get("seconds"))
        yield "time", f"{phases}; first step done after {first:.1f} s"
    for name, source in (look_up(summary, "data.sources") or {}).items():
        if (words := _source(source)) is not None:
            yield f"text {name}", words
    yield "parameters", f"{count_words(look_up(summary, 'parameters.total'))} total"
    yield "in experts", _experts(summary)
    yield "all-to-all", _all_to_all(summary)
    if others := _collectives(look_up(summary, "collectives") or {}):
        yield "other traffic", others
    yield "expert load", _load(summary)
    yield "peak memory", _memory(summary)
    yield from _features(summary)


def _features(summary: Summary) -> Iterator[tuple[str, str]]:
    rows = {
        "loss scale": ("loss_scale", _loss_scale),
        "as stored": ("validation.loss_stored", _stored),
        "teacher": ("teacher.after", _teacher),
        "conversion": ("conversion", _conversion),
        "capacity": ("capacity.factor", _capacity),
        "pipeline": ("pipeline.idle", _pipeline),
        "offload": ("memory.offload", _offload),
    }
    if look_up(summary, "recluster.rounds"):
        yield "regrouping", _regrouping(summary)
    for name, (key, words) in rows.items():
        if look_up(summary, key) is not None:
            yield name, words(summary)


def costly(summary: Summary) -> Iterator[str]:
    """Yield a warning for every figure that costs quality or time, with the key that changes it."""
    figures = {
        "dropped": (look_up(summary, "load.dropped"), MOST_DROPPED),
        "conversion": (look_up(summary, "conversion.output_error"), MOST_CONVERSION_ERROR),
        "idle": (look_up(summary, "pipeline.idle"), MOST_IDLE),
        "wait": (look_up(summary, "data.wait_share"), MOST_WAIT),
    }
    messages = {
        "dropped": "{:.1%} of the copies of tokens were dropped: raise moe.capacity_factor, or set it to null",
        "conversion": "the conversion of the standard warm-up changed the experts' outputs by {:.0%}: raise moe.rank",
        "idle": "pipeline stages were idle for {:.0%} of their passes: give smaller train.micro_batch_size",
        "wait": "steps waited for their data for {:.0%} of their time",
    }
    for name, (value, limit) in figures.items():
        if value is not None and value > limit:
            yield messages[name].format(value)
    own, flat = (look_up(summary, f"all_to_all.{key}bytes_per_token_layer") for key in ("", "flat_"))
    if own and flat and own > flat:
        yield (
            f"more bytes between ranks than flat routing would send ({byte_words(own)}, {byte_words(flat)}): see "
            "`moe-dist plan`"
        )


def _speed(summary: Summary) -> str:
    speed, ranks = look_up(summary, "tokens_per_second"), _ranks(summary)
    text = f"{number_words(speed, ',.0f')} tokens/s"
    if speed is not None and ranks is not None and ranks > 1:
        text += f", {speed / ranks:,.0f} for each device"
    if (used := look_up(summary, "model_flops_utilization")) is not None:
        text += f"; {used:.1%} of the devices' peak (MFU)"
    waited = look_up(summary, "data.wait_share")
    return text if waited is None else f"{text}; {waited:.1%} of the time waited for data"


def _loss_scale(summary: Summary) -> str:
    scaling = summary["loss_scale"]
    return f"{scaling['scale']:g}; {scaling['skipped_steps']} steps skipped, whose gradients overflowed float16"


def _regrouping(summary: Summary) -> str:
    totals = summary["recluster"]
    rounds = totals["rounds"]
    relocated = totals.get("relocation_bytes")
    moved = f", of that {byte_words(relocated)} for clusters that changed ranks" if relocated else ""
    rejected = f" ({totals['rejected_experts']} rejected)" if totals.get("rejected_experts") else ""
    return (
        f"{rounds} round{'s' if rounds > 1 else ''} moved {totals['moved_experts']} experts to other "
        f"clusters{rejected}: "
        f"{byte_words(totals['bytes'])} between ranks in {number_words(totals['seconds'], '.1f')} s{moved}"
    )


def _conversion(summary: Summary) -> str:
    found = summary["conversion"]
    return (
        f"after step {found['step']}: outputs of experts changed by {found['output_error']:.2f} (largest "
        f"{found['output_error_largest']:.2f}), the loss from {found['loss_before']:.4f} to {found['loss_after']:.4f}, "
        f"in {found['seconds']:.1f} s"
    )


def _capacity(summary: Summary) -> str:
    dropped = number_words(look_up(summary, "load.dropped"), ".2%")
    return f"{look_up(summary, 'capacity.factor'):g} times a uniform share; {dropped} of the copies dropped"


def _pipeline(summary: Summary) -> str:
    return f"stages idle for {look_up(summary, 'pipeline.idle'):.1%} of their passes"


def _all_to_all(summary: Summary) -> str:
    def at(key: str) -> Any:
        return look_up(summary, f"all_to_all.{key}")

    flat, wire = at("flat_bytes_per_token_layer"), at("wire_dtype")
    return (
        f"{byte_words(at('bytes_per_token_layer'))} per token and layer"
        f"{f' (flat routing: {byte_words(flat)})' if flat else ''}, {byte_words(at('bytes'))} total, "
        f"{byte_words(at('bytes_inter_node'))} between nodes{f'; vectors sent as {wire}' if wire else ''}"
    )


def _collectives(by_purpose: Mapping[str, Mapping[str, int]]) -> str:
    """Return the bytes of all ranks in a step beside the all-to-alls, by purpose; empty if there are none."""
    sent = {purpose: volume["bytes_per_step"] for purpose, volume in by_purpose.items() if volume["bytes_per_step"]}
    between = sum(volume["bytes_per_step_inter_node"] for volume in by_purpose.values())
    words = ", ".join(f"{purpose} {byte_words(size)}" for purpose, size in sent.items())
    return f"{words} a step; {byte_words(between)} of it between nodes" if sent else ""


def _load(summary: Summary) -> str:
    variance, cv2 = (number_words(look_up(summary, f"load.{key}"), form) for key, form in LOADS)
    return f"variance {variance}, cv² {cv2} (0: equal)"


LOADS = (("variance", ".2e"), ("cv2", ".4f"))


def _phases(seconds: Mapping[str, float | None], in_steps: float | None) -> str:
    """Return the wall time of each phase of the last job of a run.

    Args:
        in_steps: seconds in steps over all jobs of the run; more than the last one trained for if it was resumed.
    """
    known = {phase: length for phase, length in seconds.items() if length is not None}
    resumed = " since it was resumed" if (in_steps or 0.0) > known.get("train", math.inf) else ""
    parts = ", ".join(f"{phase} {length:.1f}" for phase, length in known.items())
    return f"{sum(known.values()):.1f} s{resumed}: {parts}"


def _source(source: Summary) -> str | None:
    """Return the draws and the loss of a blend's source, and what packing made of it; None: nothing to tell."""
    parts = []
    if (loss := source.get("validation_loss")) is not None:
        drawn = f"{number_words(source.get('tokens'), ',d')} tokens, {number_words(source.get('epochs'), '.2f')} epochs"
        parts.append(f"validation loss {number_words(loss, '.4f')}; {drawn}")
    if (padding := source.get("padding")) is not None:
        parts.append(f"padding {padding:.2%}, {number_words(source.get('cut_documents'), '.1%')} of documents cut")
    return "; ".join(parts) or None


def _stored(summary: Summary) -> str:
    """Return the loss with quantized clusters, and their size beside what they take in float32."""
    loss = number_words(look_up(summary, "validation.loss_stored"), ".4f")
    stored, plain = (byte_words(look_up(summary, f"stored.{key}_bytes")) for key in ("expert", "float32"))
    residuals = byte_words(look_up(summary, "stored.residual_bytes"))
    return f"validation loss {loss}; clusters take {stored}, of that residuals {residuals}; in float32 {plain}"


def _teacher(summary: Summary) -> str:
    """Return the teacher's loss, and the divergence from it before and after training."""
    before, after = (look_up(summary, f"teacher.{when}") for when in ("before", "after"))
    text = f"validation loss {after['teacher_loss']:.4f}, divergence from it {after['divergence']:.4f}"
    if before is None:
        return text
    return f"{text}; before training: own loss {before['loss']:.4f}, divergence {before['divergence']:.4f}"


def _offload(summary: Summary) -> str:
    """Return the part of the clusters that was on the device at most, and the bytes moved."""
    offload, whole = look_up(summary, "memory.offload"), look_up(summary, "memory.offloadable_bytes")
    return (
        f"at most {byte_words(offload['peak_device_bytes'])} of {byte_words(whole)} of a rank's clusters in memory; "
        f"{byte_words(offload['bytes_in'])} fetched, {byte_words(offload['bytes_out'])} evicted{_deferred(offload)}"
    )


def _deferred(offload: Summary) -> str:
    """Return the share of deferred updates; nothing if there were none."""
    deferred, updates = offload.get("deferred_updates"), offload.get("updates")
    if not deferred or not updates:
        return ""
    return f"; {deferred / updates:.1%} of updates deferred, for up to {offload.get('longest_behind')} steps"


def _ranks(summary: Summary) -> int | None:
    sizes = [look_up(summary, f"world.{axis}") for axis in ("data", "cluster", "shard")]
    return None if None in sizes else math.prod(sizes) * look_up(summary, "world.pipeline", 1)


def _world(summary: Summary) -> str:
    sizes = [look_up(summary, f"world.{axis}") for axis in ("data", "cluster", "shard")]
    if None in sizes:
        return MISSING
    data, cluster, shard = sizes
    tensor, context, stages = (look_up(summary, f"world.{axis}", 1) for axis in ("tensor", "context", "pipeline"))
    of_pipeline = f"pipeline {stages} x " if stages > 1 else ""
    parts = f"; attention: tensor {tensor} x context {context}" if tensor * context > 1 else ""
    return f"{_ranks(summary)} = {of_pipeline}data {data} x cluster {cluster} x shard {shard}{parts}"


def _experts(summary: Summary) -> str:
    own, standard = (look_up(summary, f"parameters.{key}") for key in ("expert", "expert_standard"))
    text = f"{count_words(own)}; standard experts would need {count_words(standard)}"
    return f"{text} ({own / standard:.1%} of that)" if own is not None and standard else text


def _memory(summary: Summary) -> str:
    by_rank = look_up(summary, "memory.peak_rss_bytes_by_rank") or []
    text = f"{byte_words(look_up(summary, 'memory.peak_rss_bytes'))} on the largest rank"
    if len(by_rank) > 1:
        text += f" (each: {', '.join(byte_words(value) for value in by_rank)})" if len(by_rank) <= 8 else ""
    if device := look_up(summary, "memory.peak_device_bytes"):
        text += f", {byte_words(device)} on its device"
    state, dense = (look_up(summary, f"memory.{key}") for key in ("device_bytes", "dense_bytes"))
    if state and dense:
        in_tiers = look_up(summary, "memory.offload.peak_device_bytes")
        part = f" (of that clusters in memory {byte_words(in_tiers)})" if in_tiers else ""
        text += (
            f"; weights, gradients and training state {byte_words(state)}{part}, of a dense model {byte_words(dense)}"
        )
    return text


def number_words(value: Any, form: str) -> str:
    """Return a number in a format, a dash for None."""
    if value is None:
        return MISSING
    return format(round(value) if form.endswith("d") else value, form)


def count_words(value: Any) -> str:
    """Return a count in thousands, millions or billions."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)


def byte_words(value: Any) -> str:
    """Return a size in a binary unit."""
    if value is None:
        return MISSING
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

"""A summary with every key of the contract."""

from typing import Any


def summary() -> dict[str, Any]:
    curve = [{"step": step, "tokens": step * 8192, "loss": 3.0 + 4.0 / (1 + step / 50)} for step in range(0, 401, 25)]
    return {
        "steps": 400,
        "first_step_seconds": 7.31,
        "wall_seconds": {"start": 5.01, "prepare": 2.0, "train": 228.4, "end": 1.5},
        "tokens": 3_276_800,
        "validation": {"loss": 3.4012, "perplexity": 30.0, "loss_stored": 3.4013, "curve": curve},
        "tokens_per_second": 14_321.2,
        "parameters": {"total": 3_140_000, "expert": 1_234_567, "expert_standard": 6_291_456},
        "all_to_all": {"bytes": 2_300_000_000, "bytes_inter_node": 0, "bytes_per_token_layer": 768.0},
        "load": {"variance": 1.2e-5, "cv2": 0.0123},
        "recluster": {"rounds": 2, "moved_experts": 9, "bytes": 123_456, "seconds": 0.5},
        "memory": {"peak_rss_bytes": 900_000_000, "peak_rss_bytes_by_rank": [9 * 10**8] * 4, "peak_device_bytes": 0},
        "world": {"data": 1, "cluster": 4, "shard": 1},
        "seed": 0,
        "versions": {"python": "3.11.7"},
    }

"""Keys of config.json that all families share: sizes, attention, positions and norms."""

from collections.abc import Mapping
from typing import Any

from moe_dist.config import ModelConfig
from moe_dist.errors import ConfigError

LONGEST_SEQUENCE = 2048
"""Limit of the sequence length that an imported run trains with, unless another is given."""


def attention_section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` for those of a config.json with `rope_parameters`.

    Raises:
        ConfigError: positions of a kind that we don't have.
    """
    rope = hf["rope_parameters"]
    base = float(rope["rope_theta"])
    if not base.is_integer():
        raise ConfigError(f"config.json: rope_theta={base} is not supported: must be an integer")
    latent = _latent_section(hf)
    return {
        "layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "heads": hf["num_attention_heads"],
        "kv_heads": None if latent else hf.get("num_key_value_heads"),
        "head_dim": None if latent else hf.get("head_dim"),
        "latent": latent,
        "sequence_length": min(hf["max_position_embeddings"], LONGEST_SEQUENCE),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "rope_base": int(base),
        "rope_scaling": _scaling_section(rope),
        "norm_epsilon": hf["rms_norm_eps"],
        "init_std": hf.get("initializer_range", 0.02),
    }


def window_section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` for a sliding window.

    Raises:
        ConfigError: its layers are not those from one on.
    """
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window")
    if window is None or not hf.get("use_sliding_window", True):
        return {}
    kinds = hf.get("layer_types") or ["sliding_attention"] * layers
    first = next((number for number, kind in enumerate(kinds) if kind == "sliding_attention"), layers)
    if first == layers:
        return {}
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
        raise ConfigError(
            "config.json: layer_types is not supported: a sliding window must be in all layers from one on"
        )
    return {"window": window, "window_from": first}


def attention_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json for those of `model`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rope_base)}
    longest = model.sequence_length
    if (scaling := model.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        longest = max(longest, int(scaling.factor * scaling.original_length))
        rope |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if scaling is not None and scaling.kind == "yarn":
        longest = max(longest, int(scaling.factor * scaling.original_length))
        rope |= {
            "beta_fast": scaling.fast_rotations,
            "beta_slow": scaling.slow_rotations,
            "original_max_position_embeddings": scaling.original_length,
        }
        rope |= {key: getattr(scaling, key) for key in ("mscale", "mscale_all_dim") if getattr(scaling, key)}
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.rotary_width,
        **_latent_keys(model),
        "max_position_embeddings": longest,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
    }


def _scaling_section(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": kind, "factor": rope["factor"]}
    if kind == "yarn":
        return _yarn_section(rope)
    if kind != "llama3":
        raise ConfigError(f"config.json: rope_type={kind!r} is not supported: known are default, linear, llama3, yarn")
    return {
        "kind": kind,
        "factor": rope["factor"],
        "low_frequency_factor": rope["low_freq_factor"],
        "high_frequency_factor": rope["high_freq_factor"],
        "original_length": rope["original_max_position_embeddings"],
    }


def _yarn_section(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ConfigError("config.json: rope_type='yarn' with attention_factor or truncate=false is not supported")
    return {
        "kind": "yarn",
        "factor": rope["factor"],
        "original_length": rope["original_max_position_embeddings"],
        "fast_rotations": rope.get("beta_fast") or 32.0,
        "slow_rotations": rope.get("beta_slow") or 1.0,
        "mscale": rope.get("mscale") or 0.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


_LATENT = {
    "query_rank": "q_lora_rank", "kv_rank": "kv_lora_rank", "plain_dim": "qk_nope_head_dim",
    "rotary_dim": "qk_rope_head_dim", "value_dim": "v_head_dim",
}  # fmt: skip


def _latent_section(hf: Mapping[str, Any]) -> dict[str, Any] | None:
    return {ours: hf[theirs] for ours, theirs in _LATENT.items()} if "kv_lora_rank" in hf else None


def _latent_keys(model: ModelConfig) -> dict[str, Any]:
    latent = model.latent
    if latent is None:
        return {}
    return {theirs: getattr(latent, ours) for ours, theirs in _LATENT.items()} | {"rope_interleave": True}

"""Training of a converted model (`drop_in.py`) by `transformers.Trainer`, on any number of ranks."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from moe_dist.errors import ConfigError
from moe_dist.moe.training_step import average_gradients, clip_grad_norm_, moe_layers, update_load_balance


class ClusteredMoECallback(TrainerCallback):  # type: ignore[misc]
    """Gradients of experts, their clipping and load balancing, at the Trainer's hooks.

    On several ranks the Trainer's DistributedDataParallel leaves the clusters to this callback. The Trainer clips
    before they are averaged, so give it `max_grad_norm=0` and the limit to this class.
    """

    def __init__(self, max_grad_norm: float = 1.0) -> None:
        """Args: max_grad_norm: limit of the global gradient norm; 0: none."""
        self.max_grad_norm = max_grad_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Check the Trainer's arguments.

        Raises:
            ConfigError: the model was not converted, or the Trainer would reduce or clip gradients itself.
        """
        mesh = moe_layers(model)[0].context.mesh
        if args.deepspeed or args.fsdp:
            raise ConfigError(
                "ClusteredMoECallback works with the Trainer's DistributedDataParallel: not deepspeed, fsdp"
            )
        if args.world_size != mesh.shape.ranks:
            raise ConfigError(
                f"the layers are spread over {mesh.shape.ranks} ranks, the Trainer over {args.world_size}"
            )
        if args.max_grad_norm and args.world_size > 1:
            raise ConfigError(
                f"max_grad_norm={args.max_grad_norm} clips before experts are averaged: set it to 0 in "
                "TrainingArguments and give it to ClusteredMoECallback"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Average the gradients of bases and experts, and clip all."""
        average_gradients(model, experts_only=True)
        if self.max_grad_norm:
            clip_grad_norm_(model, self.max_grad_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Update the selection biases."""
        update_load_balance(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Discard the loads of the evaluation."""
        for layer in moe_layers(model):
            layer.balance.clear_counts()

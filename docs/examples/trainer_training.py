"""A dense model of transformers with clustered experts in it, trained by `transformers.Trainer`.

Run it with `torchrun --nproc-per-node=2 docs/examples/trainer_training.py`.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from moe_dist import MoEConfig, convert
from moe_dist.integrations.huggingface.trainer import ClusteredMoECallback

dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes))  # or from_pretrained
mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "ep"))  # two ranks hold all
convert(model, MoEConfig(experts=8, clusters=2, rank=4), mesh=mesh)  # the same function, now with experts

rows = [(start + torch.arange(8)) % 64 for start in range(64)]  # each sequence counts upwards
arguments = TrainingArguments(
    output_dir="runs/trainer",
    per_device_train_batch_size=4,
    max_steps=8,
    learning_rate=1e-2,
    max_grad_norm=0,  # the callback clips, when experts are averaged
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    callbacks=[ClusteredMoECallback()],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
# moe_dist.integrations.huggingface.save_converted.save_converted(model, "trained") writes what from_pretrained loads
dist.destroy_process_group()

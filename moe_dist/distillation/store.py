"""Task that stores the predictions of `distill.teacher` for all text of a configuration, on any number of ranks."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch.distributed as dist

from moe_dist.checkpoint.new_folder import new_folder, partial_name, require_space
from moe_dist.config import RunConfig, resolve_world
from moe_dist.data import Sequences, open_sequences, prepare_data
from moe_dist.distillation.spec import StoreSpec
from moe_dist.distillation.stored_logits import (
    SPLITS,
    Split,
    StoredFacts,
    StoredWriter,
    facts_of,
    is_stored,
    stored_bytes,
)
from moe_dist.distillation.teacher import LiveTeacher, live_teacher, require_whole_text
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError

_SEQUENCES = 8
"""Sequences of a batch: any small number."""


def store_logits(config: RunConfig, spec: StoreSpec) -> None:
    """Write the teacher's predictions for training and validation text as a new folder; collective.

    All ranks must see the same file system.

    Raises:
        MoeDistError: one line; nothing is left at the target.
    """
    process = init_distributed(config.world)
    _require_model(config)
    data = prepare_data(config.corpus, config.tokenizer)
    if spec.top_k > data.vocab_size:
        raise ConfigError(f"--top-k {spec.top_k} is more than the vocabulary of {data.vocab_size} tokens")
    mesh = Mesh.create(resolve_world(config, process.ranks), process.timeout)
    teacher = live_teacher(config, process, mesh, data)
    files: dict[Split, Sequences] = {split: open_sequences(config, data, split)[""] for split in SPLITS}
    length = config.model.sequence_length
    counts = {split: len(sequences) for split, sequences in files.items()}
    facts = facts_of(config, data, spec.top_k, teacher.step)
    target = Path(spec.target)
    writer, size = StoredWriter(partial_name(target)), stored_bytes(facts, sum(counts.values()))
    with ExitStack() as until_whole:
        with raise_on_all_ranks():
            if process.rank == 0:
                require_space(until_whole.enter_context(new_folder(target)), size)
                writer.create(facts, counts)
        for split, sequences in files.items():
            _store(teacher, writer, split, sequences, facts, process)
        dist.barrier()
    if process.rank == 0:
        tokens = sum(counts.values()) * length
        print(f"{target}: the {spec.top_k} likeliest next tokens of {tokens:,} tokens, {size:,} bytes")
    shutdown()


def _require_model(config: RunConfig) -> None:
    folder = config.distill.teacher
    if folder is None or is_stored(Path(folder)):
        raise ConfigError(f"distill.teacher={folder}: must be the run or checkpoint whose predictions are to be stored")
    require_whole_text(config, "predictions that are stored")


def _store(
    teacher: LiveTeacher,
    writer: StoredWriter,
    split: Split,
    sequences: Sequences,
    facts: StoredFacts,
    process: RankInfo,
) -> None:
    """Compute and write this rank's share of a split; all ranks run equally many batches."""
    count = len(sequences)
    share = -(-count // process.ranks)
    for first in range(process.rank * share, (process.rank + 1) * share, _SEQUENCES):
        wanted = np.arange(first, min(first + _SEQUENCES, (process.rank + 1) * share), dtype=np.int64)
        index_B = wanted.clip(max=count - 1)
        sequence_BS = sequences.read(index_B).to(process.device)
        found = teacher.targets(split, index_B, sequence_BS)
        with raise_on_all_ranks():
            writer.write(split, index_B[wanted < count], facts.top_k, found)

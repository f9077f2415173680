"""Corpora, tokenizers, memory-mapped token files, and the batches read from them."""

from moe_dist.data.batches import blend_plan, open_batches, open_sequences
from moe_dist.data.loader import ORDER, Batch, PrefetchingLoader, SequenceLoader
from moe_dist.data.prepare import PreparedData, prepare_data
from moe_dist.data.sequences import Sequences
from moe_dist.data.token_file import TokenFile
from moe_dist.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_in
from moe_dist.data.validation import ValidationBatch, validation_batches

__all__ = [
    "ORDER",
    "Batch",
    "PrefetchingLoader",
    "PreparedData",
    "SequenceLoader",
    "Sequences",
    "TokenFile",
    "Tokenizer",
    "ValidationBatch",
    "blend_plan",
    "open_batches",
    "open_sequences",
    "open_tokenizer",
    "prepare_data",
    "tokenizer_in",
    "validation_batches",
]

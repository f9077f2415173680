"""Corpora, tokenizers, memory-mapped token files, and the batches read from them."""

from moe_dist.data.loader import SequenceLoader, sequence_count
from moe_dist.data.prepare import PreparedData, prepare_data
from moe_dist.data.token_file import TokenFile
from moe_dist.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_in
from moe_dist.data.validation import ValidationBatch, validation_batches

__all__ = [
    "PreparedData",
    "SequenceLoader",
    "TokenFile",
    "Tokenizer",
    "ValidationBatch",
    "open_tokenizer",
    "prepare_data",
    "sequence_count",
    "tokenizer_in",
    "validation_batches",
]

"""A run's SentencePiece tokenizer as a tokenizer.json, with the same ids.

One text differs: a ▁ (U+2581), which SentencePiece here writes as bytes, becomes a space.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from moe_dist.data.hf_tokenizer import TOKENIZER_JSON, require_tokenizers
from moe_dist.data.tokenizer import END_OF_DOCUMENT_PIECE, UNKNOWN_PIECE

SPACE_MARK = "\u2581"


def converted_files(path: Path) -> dict[str, bytes]:
    """Return the files of a Hugging Face tokenizer for a SentencePiece model of `train_tokenizer`."""
    tokenizers = require_tokenizers()
    model = sentencepiece.SentencePieceProcessor()
    model.load(str(path))
    made = tokenizers.Tokenizer(_model(tokenizers, model))
    made.normalizer = tokenizers.normalizers.Replace(" ", SPACE_MARK)
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    words = [piece for piece in ("\n", "\t") if model.piece_to_id(piece) != model.unk_id()]
    made.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    made.add_special_tokens([UNKNOWN_PIECE, END_OF_DOCUMENT_PIECE])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT_PIECE,
        "pad_token": END_OF_DOCUMENT_PIECE,
        "unk_token": UNKNOWN_PIECE,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER_JSON: made.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=1).encode()}


def _model(tokenizers: Any, model: Any) -> Any:
    """Return the library's model of the same pieces and scores, or of the merges that scores imply."""
    pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    scores = [model.get_score(number) for number in range(len(pieces))]
    if any(score != round(score) for score in scores):  # log-probabilities: unigram
        return tokenizers.models.Unigram(
            list(zip(pieces, scores, strict=True)), unk_id=model.unk_id(), byte_fallback=True
        )
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: (-scores[vocabulary[piece]], vocabulary[piece])):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return tokenizers.models.BPE(vocabulary, merges, unk_token=UNKNOWN_PIECE, fuse_unk=True, byte_fallback=True)

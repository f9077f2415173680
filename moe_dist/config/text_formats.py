"""Endings of the text files that are read, for what looks at names before any data is."""

PLAIN = (".txt", ".tokens", ".raw", ".md", ".rst", ".py")  # the second and third are WikiText's own
TABLES = (".jsonl", ".parquet")
SUFFIXES = (*PLAIN, *TABLES)
COMPRESSIONS = (".gz", ".zst")
COMPRESSIBLE = (*PLAIN[:1], *TABLES[:1])
ENDINGS = (*SUFFIXES, *(f"{suffix}{ending}" for suffix in COMPRESSIBLE for ending in COMPRESSIONS))
"""All endings, those of compressed files among them."""
TOKEN_LISTS = (".npy", ".parquet")
"""Endings of files of ids (`corpus.kind=tokens`)."""

"""Hugging Face checkpoints: import, upcycling and compression, export, and the classes that transformers loads."""

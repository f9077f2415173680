"""Evaluation of trained models: perplexity on WikiText, and GLUE after fine-tuning."""

"""Measurement of the bytes between ranks."""

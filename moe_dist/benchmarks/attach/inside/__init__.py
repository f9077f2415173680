"""Modules that run inside of the program that is measured: standard library and torch only, imported by path."""

"""Dispatch of tokens to experts and combination of results: permutation, all-to-all, and traffic accounting."""

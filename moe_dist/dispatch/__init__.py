"""Moving tokens to their experts and back: permutation, all-to-all, combination, and the account of every byte."""

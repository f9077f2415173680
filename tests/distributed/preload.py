"""Imported once by the fork server, so that each rank starts with everything loaded."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import moe_dist.training.trainer  # noqa: F401

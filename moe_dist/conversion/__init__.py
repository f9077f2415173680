"""Turns standard experts into clustered ones: what they are given, which belong together, base and residuals."""

"""Simulator: memory, traffic and step time of a configuration on other machines.

Analytic, in numpy: it runs no model.
"""

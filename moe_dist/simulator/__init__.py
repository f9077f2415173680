"""Predicts memory, traffic and step time of a configuration on machines that are not here.

Analytic, in numpy: nothing here runs a model.
"""

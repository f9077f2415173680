"""Starting ranks: the entry script each rank runs, and the commands that start ranks on this machine.

Imports moe_dist.config and moe_dist.errors alone, so that it answers before torch is loaded; `train.py` hands over to
moe_dist.training once a configuration has been accepted.
"""

"""Launch of jobs: the entry script of a rank, and the commands that start ranks on this machine or on several.

Imports moe_dist.config and moe_dist.errors alone, so that it works before torch is loaded; `rank.py` runs a task of
`tasks.py` once a configuration has been accepted.
"""

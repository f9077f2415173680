"""MoE layers of other libraries, as baselines."""

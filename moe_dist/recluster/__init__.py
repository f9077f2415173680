"""Re-clustering during training: decision, migration of experts between clusters and ranks, collective switch.

Decisions, plans and transfers are functions of placements and flat tensors; only `coordinator`, `migration_executor`,
`refit`, `expert_tensors` and `similarity_gather` use models and engines.
"""

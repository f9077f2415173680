"""MoE layers: clustered, standard and dense feed-forward layers, their routing and their load balancing."""

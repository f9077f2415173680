"""The language model: clustered, standard and dense feed-forward layers on one Megatron-core backbone."""

"""Language model: clustered, standard or dense feed-forward layers on a Megatron-core backbone."""

"""Traffic, load, memory, scaling and speed: what a run did and what a machine can do."""

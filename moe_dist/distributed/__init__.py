"""Layout of ranks and experts: mesh and process groups, links between ranks, expert placement."""

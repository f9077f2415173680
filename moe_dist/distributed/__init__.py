"""Where ranks and experts are: mesh and process groups, links between ranks, expert placement."""

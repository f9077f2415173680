"""Teachers: models whose next-token distributions a run is trained on, computed in each step or stored before."""

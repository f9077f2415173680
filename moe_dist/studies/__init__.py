"""Studies: many runs compared, with finished runs kept."""

"""Mutations of core glue, each of which some test has to notice (`make mutants`)."""

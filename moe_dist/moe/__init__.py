"""Pure routing decisions: which cluster and experts a token goes to, with what gate, and how loads are balanced."""

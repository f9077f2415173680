"""Moves experts between clusters and ranks: who moves, what travels, and how all ranks switch together.

Nothing here knows of models or engines: placements and flat tensors come in, and go out.
"""

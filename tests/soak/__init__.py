"""A long trial by fault: runs are killed at random points and resumed until they end as an undisturbed one does."""

"""`python -m moe_dist` is `moe-dist`."""

from moe_dist.cli import main

main()

"""The paper's table, reproduced: every kind of layer trained on the same tokens and evaluated: `moe-dist reproduce`."""

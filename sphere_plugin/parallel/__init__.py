"""Several processes that share the work of one run: torchrun starts them, torch.distributed connects them.

Rank 0 is the run: it decides, and writes all files. The others hold the same model and do as it says, each its share
of what can be shared, and all of them exchange what came of it. docs/scale.md says what is shared.
"""

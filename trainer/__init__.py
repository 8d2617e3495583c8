"""The training loop: exact steps, ZeRO-3, checkpoints. Runs under Ray, ``torchrun`` or one process alike."""

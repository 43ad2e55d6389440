"""Training: train.py (a run from options to results) -> trainer.py (state, epoch loop) -> loop.py (one step)."""

"""Checkpoints: files on disk, loading, saving, a feature memory in a file, conversion from other projects."""

"""From annotation file to batches: annotations/ reads it, dataset.py makes samples, loader.py makes batches,
prefetch.py moves them to a GPU."""

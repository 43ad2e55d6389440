"""Rows of the paper's tables: the run of each, the record it leaves, statistics over seeds, claims."""

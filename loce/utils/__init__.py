"""Utilities without detection in them: labels, errors, files, options, process groups, progress, signals."""

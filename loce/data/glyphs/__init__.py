"""Glyph-LVIS, a long-tailed instance segmentation set in LVIS v1's format, drawn on this machine."""

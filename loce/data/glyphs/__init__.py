"""Glyph-LVIS, a long-tailed instance segmentation set in LVIS v1's format, drawn on this machine.

characters.py: the classes; plan.py: which class in which image, scenes.py: what differs in version 2; drawing.py: one
image; records.py: masks and JSON; page.py: samples to look at; make.py: the folder as a whole; exports.py: the set in
formats of annotation tools.
"""

"""Results for people: figures, the equilibrium report (one HTML file), tables/ of the paper.

reading.py: the files of a run; states.py: per-class curves (Eq. 2, 4, 7-8); panels.py: what the sections show; page.py
fills page.html with it; script.js draws its charts, style.css says how all looks. figures.py: PNG and PDF.
"""

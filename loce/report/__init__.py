"""The equilibrium report: what became of every class in one or several runs, as one HTML file that needs nothing else.

reading.py: the files of a run; states.py: numbers of every class over time (Eq. 2, 4, 7-8); samples.py: predictions
drawn; page.py, panels.py: the page; script.js draws its charts, style.css says how all looks.
"""

"""Tables of the paper.

rows.py: rows and their runs; steps.py, training.py: runs started and finished; records.py: what a run leaves;
statistics.py: means and intervals; claims.py: verdicts; cells.py: Markdown; results.py: the page.
"""

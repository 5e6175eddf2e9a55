"""Flat and hierarchical dispatch in interleaved rounds, on two simulated nodes of two ranks each on one machine.

cases.py      layers of equal multiply-adds, the routes drawn for them, and the slow link
rank.py       the work of each of the four processes
measure.py    start the processes and combine their figures
"""

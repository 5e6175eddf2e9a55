"""Flat and hierarchical dispatch in interleaved rounds, on one machine that simulates two nodes of two ranks each.

cases.py      layers of equal multiply-adds, random routes, and the slow link
rank.py       work of each of the four processes
measure.py    start of the processes, and their combined figures
"""

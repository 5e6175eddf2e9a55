"""Flat and hierarchical dispatch of rows to experts, measured on one machine that simulates two nodes of two ranks.

cases.py      layers of equal multiply-adds, random choices of experts, and the bytes that they send
link.py       the slow link between the nodes
rank.py       work of each of the four processes
measure.py    start of the processes, and their combined measurements
"""

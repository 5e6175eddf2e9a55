"""Fuzzing of every file that the program reads: a damaged file gives one line and a documented exit code."""

"""Batch inference: a Ray Data job that answers all rows of a file, and continues where it was killed.

request.py    what is asked: a checkpoint, an input file, and how answers are drawn
rows.py       a row of the input and its answer: the check of a row, and the columns of an answer
formats.py    JSON lines and Parquet: reads rows chunk by chunk, and writes them with their answers
input.py      the input file: finds it, and checks all of its rows
output.py     the output folder: one file for each chunk of rows, its request, and its counts when it is complete
worker.py     the actor that answers chunks with one engine
pipeline.py   the dataset: reads the missing chunks, and maps them over a pool of workers
job.py        the Ray job of `mhmoe generate --input`
"""

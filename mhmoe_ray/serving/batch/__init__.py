"""Batch inference: a Ray Data job that answers the prompt in each row of a file.

If a job is killed, the next job for the same request answers only the rows that have no answers yet.

request.py    the request: a checkpoint, an input file, and how answers are sampled
rows.py       a row of the input and its answer
formats.py    JSON lines and Parquet: reads rows chunk by chunk, and writes them with their answers
input.py      the input file: finds it, and checks all of its rows
output.py     the output folder: the request, one file for each chunk of rows, and the counts of answers
worker.py     the actor that answers chunks with one engine
pipeline.py   the Ray dataset: maps the chunks without answers over workers
job.py        the Ray job of `mhmoe generate --input`
"""

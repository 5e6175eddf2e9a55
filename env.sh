export PYTHONPATH=/tmp/t:/tmp/t/kernels
PY=/work/main/.venv/bin/python

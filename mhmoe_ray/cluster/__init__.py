"""How the command line talks to Ray: over HTTP, with a token. No module here but
doctor/machine.py imports ray or torch when imported."""

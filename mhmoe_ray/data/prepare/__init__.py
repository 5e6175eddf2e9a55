"""Raw text to packed shards, as a job of the cluster."""

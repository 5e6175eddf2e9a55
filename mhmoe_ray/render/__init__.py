"""Files for clusters and their monitoring, as `mhmoe cluster render` writes them; no server is contacted.

    files.py        all files of a site, by path, and whether a run fits on it
    kuberay.py      manifests for KubeRay, and the image of all nodes
    ray_up.py       cluster files for `ray up`: AWS, GCP, on-premise machines
    slurm.py        a batch script
    monitoring.py   how Prometheus discovers Ray's nodes, and Grafana's dashboards

The folder cluster/ holds the files rendered from cluster/site.yaml; tests/render fails if it does not.
"""

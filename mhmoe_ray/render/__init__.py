"""Files for clusters and their monitoring, as `mhmoe cluster render` writes them; no server is contacted.

    files.py        all files of a site, by path, and the check that a run fits on it
    kuberay.py      manifests for KubeRay, and the image of all nodes
    ray_up.py       cluster files for `ray up`: AWS, GCP, on-premise machines
    slurm.py        a batch script
    monitoring.py   discovery of Ray's nodes by Prometheus, and Grafana's dashboards

The folder cluster/ holds the files rendered from cluster/site.yaml, which tests/render checks.
"""

"""Files for clusters and what watches over them, as `mhmoe cluster render` writes them. Text alone: nothing is asked.

    files.py        all of a site's files, by path, and whether a run fits on it
    kuberay.py      manifests for KubeRay, and the image of all nodes
    ray_up.py       cluster files for `ray up`: AWS, GCP, machines of one's own
    slurm.py        a batch script
    monitoring.py   where Prometheus finds Ray's nodes, and what Grafana shows

The folder cluster/ holds what they make of cluster/site.yaml; tests/render fails where it does not.
"""

"""Files for clusters and what watches over them, as `mhmoe cluster render` writes them. Text alone: nothing is asked.

    files.py        all of a site's files, by path
    files.py          whether a run fits on a site
    kuberay.py      manifests for KubeRay
    ray_up.py       cluster files for `ray up`: AWS, GCP, machines of one's own
    slurm.py        a batch script
    kuberay.py    the image of all nodes
    monitoring.py   where Prometheus finds Ray's nodes
    monitoring.py   what Grafana shows: panels and their queries
    monitoring.py      those as Grafana's JSON

The folder cluster/ holds what they make of cluster/site.yaml; tests/render fails where it does not.
"""

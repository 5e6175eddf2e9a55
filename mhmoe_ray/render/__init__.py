"""Files for clusters and their monitoring, as `mhmoe cluster render` writes them; no server is contacted.

A site is the description of a cluster, from which the files are made.

    files.py        all files of a site, by path, and the check that a training run fits on its nodes
    kueue.py        the queue of a site in Kueue
    kuberay.py      manifests for KubeRay
    container.py    the container file: images that train, or serve with vLLM
    ray_up.py       cluster files for `ray up`: AWS, GCP, on-premise machines
    slurm.py        a batch script
    monitoring.py   discovery of Ray's nodes by Prometheus, and Grafana's dashboards

The folder cluster/ holds the files that are rendered from cluster/site.yaml; tests/render checks that they are current.
"""

"""Servers of Ray on this machine that others can reach, and dashboards that take jobs from them."""

import ipaddress
from collections.abc import Iterator

import psutil

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.doctor.finding import Finding

KINDS = {"gcs_server": "GCS", "raylet": "raylet", "dashboard": "dashboard", "ray.util.client": "client server"}
"""By what is in a command line."""


def port_findings() -> Iterator[Finding]:
    try:
        listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:  # macOS, for one
        yield Finding("note", "open ports", "this user may not list them", "run `mhmoe doctor` as root to see")
        return
    found: set[tuple[str, str, int]] = set()
    for connection in listening:
        kind = _kind(connection.pid) if connection.pid else None
        if kind and connection.laddr and not ipaddress.ip_address(connection.laddr.ip).is_loopback:
            found.add((kind, connection.laddr.ip, connection.laddr.port))
    boards = [place for place in found if place[0] == "dashboard" and dashboard.is_open(dashboard.url_at(*place[1:]))]
    for _, host, port in sorted(boards):
        why = f"the dashboard at {host}:{port} of this machine takes jobs from everybody on its network"
        fix = "start it with RAY_AUTH_MODE=token, or with --dashboard-host=127.0.0.1"
        yield Finding("warning", "open dashboard", why, fix)
    if others := sorted(found - set(boards)):
        said = ", ".join(f"{kind} {host}:{port}" for kind, host, port in others[:6])
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        fix = "keep these ports behind a firewall; a token guards them if Ray was started with one"
        yield Finding("note", "open ports", f"other machines reach {said}{more}", fix)
    elif not boards:
        yield Finding("ok", "open ports", "no server of Ray on this machine listens beyond loopback")


def _kind(pid: int) -> str | None:
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None
    return next((kind for part, kind in KINDS.items() if "ray" in command and part in command), None)

"""Batch script for SLURM that runs a Ray cluster on the nodes of a job for as long as a run takes."""

from mhmoe_ray.spec.site import SiteSpec, SlurmSpec

# SLURM sends USR1 180 s before the time limit of a job, so that the run has time to save a last checkpoint. With a
# drain timeout of 0, Ray stops at once; by default `ray start --block` first drains its node for up to 30 s.
TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --partition={partition}
{account}#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --mem={memory}G
#SBATCH --time={time}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# sbatch slurm.sh SPEC starts a Ray cluster on these nodes and trains on it. A job that starts again continues its run.
set -euo pipefail
spec=${{1:?usage: sbatch slurm.sh SPEC}}
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export SRUN_CPUS_PER_TASK={cpus}  # since 22.05 srun does not take it from sbatch
export MHMOE_HOME=${{MHMOE_HOME:-$HOME/.local/state/mhmoe}}

# A token of this cluster: without one, everybody on the nodes' network could give it jobs.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.mhmoe-token-$SLURM_JOB_ID
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH"

# Other Ray clusters may run on the same nodes, so the ports depend on the job.
port=$(({port} + SLURM_JOB_ID % 1000))
board=$(({board} + SLURM_JOB_ID % 1000))
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_host=${{hosts[0]}}
head_ip=$(srun --nodes=1 --ntasks=1 -w "$head_host" hostname --ip-address | awk '{{print $1}}')
folder=$(mktemp -d -p /tmp ray-XXXXXX)

finish() {{
  rm -f "$RAY_AUTH_TOKEN_PATH"
  # This ends steps of this job alone, and no other Ray on these nodes.
  scancel --signal=TERM "$SLURM_JOB_ID" 2> /dev/null || true
  wait "${{head:-}}" 2> /dev/null || true
  srun --overlap rm -rf "$folder" 2> /dev/null || true
}}
trap finish EXIT

srun --nodes=1 --ntasks=1 -w "$head_host" ray start --head --block --node-ip-address="$head_ip" --port="$port" \\
  --dashboard-host=127.0.0.1 --dashboard-port="$board" --temp-dir="$folder" {resources} --disable-usage-stats &
head=$!
for host in "${{hosts[@]:1}}"; do
  srun --nodes=1 --ntasks=1 -w "$host" ray start --block --address="$head_ip:$port" {resources} \\
    --disable-usage-stats &
done

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$board
field() {{ python -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }}
for i in {{1..100}}; do  # until all nodes have joined
  nodes=$(mhmoe cluster status --json 2> /dev/null | field nodes 2> /dev/null) || nodes=0
  [ "$nodes" -ge "${{#hosts[@]}}" ] && break
  kill -0 "$head" && [ "$i" -lt 100 ] || {{ echo "error: not all of ${{hosts[*]}} joined the cluster" >&2; exit 1; }}
  sleep 3
done
run=$(mhmoe submit "$spec" --continue --detach --json | field path)
# Before the time is over, the run saves a checkpoint and ends, and the job is put into the queue again.
trap 'mhmoe stop "$run" && scontrol requeue "$SLURM_JOB_ID"' USR1
mhmoe status "$run" --watch &
watch=$!
# The watch outlives a cluster that does not answer, so the head is watched as well.
while kill -0 "$watch" 2> /dev/null; do
  kill -0 "$head" 2> /dev/null || {{
    echo "error: the head of the cluster has ended; the job is put into the queue again" >&2
    kill "$watch"
    scontrol requeue "$SLURM_JOB_ID"
    exit 1
  }}
  sleep 3 &
  wait $!  # a signal ends a wait at once, and runs its trap
done
wait "$watch"
mhmoe status "$run"
[[ $(mhmoe status "$run" --json | field state) =~ ^(finished|stopped)$ ]]
"""


def batch_script(site: SiteSpec, slurm: SlurmSpec) -> str:
    """Return the text of the batch script for `sbatch`, which takes the path of a run's spec as its argument."""
    workers = site.workers
    return TEMPLATE.format(
        name=site.name,
        partition=slurm.partition,
        account=f"#SBATCH --account={slurm.account}\n" if slurm.account else "",
        nodes=slurm.nodes,
        cpus=workers.cpus,
        gpus=f"#SBATCH --gpus-per-node={workers.gpus}\n" if workers.gpus else "",
        memory=workers.memory_gib,
        time=slurm.time,
        resources=f"--num-cpus={workers.cpus}" + (f" --num-gpus={workers.gpus}" if workers.gpus else ""),
        port=slurm.port,
        board=slurm.dashboard_port,
    )

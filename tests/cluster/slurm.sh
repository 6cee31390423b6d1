#!/bin/bash
# A small sweep on a real Slurm of one node, against the same sweep without one.
# One job is killed by SIGKILL and one is made to fail: the others finish, and the same command then
# finishes the rest. Skipped, with the reason, where Slurm is not installed.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
for tool in slurmctld slurmd munged; do
  PATH=$PATH:/usr/sbin command -v $tool >/dev/null || { echo "skipped: no $tool"; exit 0; }
done
[ "$(id -u)" = 0 ] || { echo "skipped: only root can start slurmd"; exit 0; }
export PATH=$here:$PATH:/usr/sbin PYTHONPATH=$PWD OMP_NUM_THREADS=1  # its sacct comes first
"$here/start.sh" || exit 1
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
words=(-m data=photos attack=inverting,inverting_signed defense=prune,clip rounds=2 images=2 clients=2 control=false
       client.batch=4 stack=1 attack.steps=400 device=cpu)
slurm=(hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.array_parallelism=2)
fail() { echo "FAILED: $1"; exit 1; }

echo "# one cell cannot start (its folder holds another's file), one is killed once it runs"
mkdir -p "$out/slurm/003-inverting_signed-clip-0" && echo mine > "$out/slurm/003-inverting_signed-clip-0/notes.txt"
$python -m fedsec.run "${words[@]}" "${slurm[@]}" out="$out/slurm" > "$out/first.txt" 2>&1 &
sweep=$!
config=$out/slurm/000-inverting-prune-0/config.yaml
for _ in $(seq 600); do [ -s "$config" ] && break; kill -0 $sweep || break; sleep 0.5; done
[ -s "$config" ] || fail "no cell started: $(cat "$out/first.txt")"
$python -m fedsec.status "$out/slurm"
job=$(squeue -h -t running -o %A -S i | head -1)
scancel --signal=KILL --full "$job" || fail "no job to kill"
wait $sweep; status=$?
cat "$out/first.txt"
[ $status = 2 ] || fail "exit status $status, not 2"
[ -e "$out/slurm/000-inverting-prune-0/run.json" ] && fail "the job was not killed"
for cell in 001-inverting-clip-0 002-inverting_signed-prune-0; do
  [ -e "$out/slurm/$cell/run.json" ] || fail "$cell did not finish"
done

echo "# the same command finishes the rest"
rm "$out/slurm/003-inverting_signed-clip-0/notes.txt"
$python -m fedsec.run "${words[@]}" "${slurm[@]}" out="$out/slurm"
status=$?
[ $status = 0 ] || fail "exit status $status, not 0"

echo "# without Slurm"
$python -m fedsec.run "${words[@]}" out="$out/serial" > "$out/serial.txt" 2>&1 || fail "serial"
$python "$here/equal.py" "$out/slurm" "$out/serial" || fail "they differ"
$python -m fedsec.status "$out/slurm"
rm -r "$out"

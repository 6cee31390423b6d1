#!/bin/bash
# A Slurm of one node on this machine, as root and without systemd; nothing where one answers.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sinfo >/dev/null 2>&1 && exit 0
install -d -o munge -g munge -m 0755 /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged
install -d /etc/slurm /var/spool/slurmd
install -d -o slurm -g slurm /var/spool/slurmctld /var/log/slurm
node=$(slurmd -C | head -1)
sed -e "s/@HOST@/$(hostname -s)/" -e "s/@NODE@/$node/" "$here/slurm.conf" > /etc/slurm/slurm.conf
slurmctld
slurmd
for _ in $(seq 30); do
  srun -n1 hostname >/dev/null 2>&1 && exit 0
  sleep 1
done
echo "error: Slurm does not answer: see /var/log/slurm" >&2
exit 1

#!/bin/bash
# preStop of the head pod: asks the driver to save and stop, and waits until it has.
#   stop-driver.sh SECONDS SCRIPT     SCRIPT: the driver's finetune.py, as it stands in its command line
# Not `ray job stop`: that leaves the Ray job STOPPED, which KubeRay takes for complete and never retries. A driver that
# is signalled saves and exits with 75; the job is FAILED then, and the next RayCluster carries on.
set -u
limit=$1 script=$2

drivers() {
  local process argv
  for process in /proc/[0-9]*; do
    mapfile -d '' -t argv 2>/dev/null <"$process/cmdline" || continue
    if [[ ${#argv[@]} -ge 2 && ${argv[0]##*/} == python* && ${argv[1]} == "$script" ]]; then
      echo "${process#/proc/}"
    fi
  done
}

found=$(drivers)
[[ -z $found ]] && exit 0
# shellcheck disable=SC2086 - one pid a word
kill -TERM $found
while [[ -n $(drivers) ]]; do
  if ((SECONDS >= limit)); then
    echo "stop-driver: not finished after $limit s (termination.saveSeconds)" >&2
    exit 1
  fi
  sleep 1
done

#!/usr/bin/env bash
# Trains every loss on every data set with every seed, and ends with the results table.
#
#   bash experiments.sh                                      twelve losses x market and duke (those in datasets/) x 5 seeds
#   DRY_RUN=1 bash experiments.sh                            prints every command and the hours, runs nothing
#   LOSSES="arcface softmax+triplet" SEEDS="0 1" bash experiments.sh
#   DATASETS=market bash experiments.sh --recipe published   further flags go to train.py
#   DATASETS=synthetic LOSSES=all JOBS=2 bash experiments.sh
#
# Environment: DATASETS, LOSSES (all: the later ones, too), SEEDS: lists; DATA_DIR: the folder that holds the data sets'
#              folders (datasets); JOBS=n: trainings at a time, bound to the GPUs by turns or to a share of the cores;
#              SHARE=2/8: the second eighth of the runs, for several machines; DRY_RUN=1; PYTHON (python).
#
# With neither Market nor Duke in DATA_DIR, and no DATASETS given, it trains on generated pedestrians with one seed.
# A run's folder is runs/NAME, as train.py names it. A finished run is skipped (remove its folder to repeat it), one that
# began goes on. A failing run does not stop the others; Ctrl-C stops all, and the same command goes on from there.
# Exit code: 0, 1 if a run failed, 2 for a wrong call, 130 after Ctrl-C.

set -uf # -f: the * of 0.5*triplet is no file name

case ${1-} in -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
export PYTHON=${PYTHON:-python} JOBS=${JOBS:-1}
case $PYTHON in */*) [ "${PYTHON#/}" != "$PYTHON" ] || PYTHON=$PWD/$PYTHON ;; esac # relative: from where it was called
case ${DATA_DIR-} in "" | /*) ;; *) export DATA_DIR=$PWD/$DATA_DIR ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 2
command -v "$PYTHON" >/dev/null || { echo "experiments.sh: no program $PYTHON: set PYTHON=python3, say" >&2 && exit 2; }

commands=$("$PYTHON" -m utils.plan "$@") || exit 2
if [ "${DRY_RUN:-0}" != 0 ]; then
  [ -z "$commands" ] || printf '%s\n' "$commands"
  exit 0
fi

code=0
if [ -n "$commands" ]; then # a stopped training (130, 143) stops all: 255 tells xargs so
  trap : INT                 # Ctrl-C ends the trainings; this script still says how to go on
  printf '%s\n' "$commands" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c '
    echo "$0" >&2
    eval "$0"
    case $? in
      0) ;;
      130 | 143) exit 255 ;;
      *) echo "FAILED: $0" >&2 && exit 1 ;;
    esac'
  case $? in
    0) ;;
    123) code=1 ;;
    *) echo "Stopped. The same command goes on from here." >&2 && exit 130 ;;
  esac
fi
"$PYTHON" -m utils.results runs || exit 1
exit $code

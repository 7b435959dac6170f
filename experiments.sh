#!/usr/bin/env bash
# Trains every loss on every data set with every seed, and ends with the results table.
#
#   bash experiments.sh                                      twelve losses x market and duke (those in datasets/) x 5 seeds
#   DRY_RUN=1 bash experiments.sh                            prints every command and the hours, runs nothing
#   LOSSES="arcface softmax+triplet" SEEDS="0 1" bash experiments.sh
#   DATASETS=market bash experiments.sh --recipe published   further flags go to train.py
#   DATASETS=synthetic QUICK=1 SEEDS="0 1 2" bash experiments.sh
#
# Environment: DATASETS, LOSSES, SEEDS (lists), QUICK=1 (the flags of QUICK_FLAGS below), DRY_RUN=1,
#              DATA_DIR (the folder that holds the data sets' folders, default: datasets), PYTHON (default: python).
#
# With neither Market nor Duke in DATA_DIR, and no DATASETS given, it runs the generated data set, QUICK=1, one seed.
# Run NAME = DATASET_LOSS_sSEED, and with further flags _VARIANT: its folder is runs/NAME, and its numbers are kept in
# results/runs/NAME.json. A run with that file is finished and skipped; one that began is resumed. Seed comes after seed,
# so that the table is complete early and only gets sharper. A failing run does not stop the others; Ctrl-C stops all,
# and the same command goes on from there. To repeat a finished run, remove its folder and its file.
# Exit code: 0, 1 if a run failed, 2 for a wrong call, 130 after Ctrl-C.

set -uf # -f: the * of 0.5*triplet is no file name

ALL_LOSSES="softmax triplet softmax+triplet softmax+center npair histogram focal multi_similarity
            sphereface_m1 sphereface cosface arcface"
QUICK_FLAGS=(--arch resnet18 --weights none --height 128 --width 64 --epochs 5 --milestones 4)

stop() {
  echo "experiments.sh: $1" >&2
  exit 2
}

absolute() { # relative paths are meant from where the script was called
  case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

present() { # is one of these folders, with training images in it, under DATA_DIR?
  local place
  for place; do
    [ -d "${DATA_DIR:-datasets}/$place/bounding_box_train" ] && return 0
  done
  return 1
}

# Further flags as a part of the name: other flags, another name. Flags that change no number are left out.
variant() {
  local LC_ALL=C text="" clean
  while [ $# -gt 0 ]; do
    case $1 in
      --workers | --cache | --device | --eval-every) [ $# -gt 1 ] && shift ;;
      --workers=* | --cache=* | --device=* | --eval-every=*) ;;
      --recipe) # the name of the recipe is enough
        [ $# -gt 1 ] && shift
        [ "$1" = controlled ] || text="${text}_$1"
        ;;
      --recipe=*) [ "${1#*=}" = controlled ] || text="${text}_${1#*=}" ;;
      --*) text="${text}_${1#--}" ;;
      *) text="$text-$1" ;;
    esac
    shift
  done
  clean=${text//[^A-Za-z0-9_.=+-]/-}
  if [ "$clean" != "$text" ] || [ ${#clean} -gt 80 ]; then # a path, say: shortened, so a checksum tells them apart
    clean=${clean:0:80}-$(printf %s "$text" | cksum | cut -d ' ' -f 1)
  fi
  echo "$clean"
}

is_finished() { [ -s "results/runs/$1.json" ]; }

# ---------------------------------------------------------------------------------------------------- what is to be run

case ${1-} in -h | --help)
  sed -n '2,/^$/ s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
for word; do
  case $word in
    --loss | --loss=* | --dataset | --dataset=* | --seed | --seed=*)
      stop "${word%%=*} is set by this script: use LOSSES, DATASETS or SEEDS" ;;
    --data-dir | --data-dir=*) stop "set DATA_DIR=FOLDER instead of --data-dir" ;;
    --run-dir | --run-dir=* | --resume | --show-recipe) stop "${word%%=*} is for single runs: use train.py" ;;
  esac
done

PYTHON=${PYTHON:-python}
case $PYTHON in */*) PYTHON=$(absolute "$PYTHON") ;; esac
[ -z "${DATA_DIR-}" ] || DATA_DIR=$(absolute "$DATA_DIR")
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 2
command -v "$PYTHON" >/dev/null || stop "no program $PYTHON: name the interpreter, for example PYTHON=python3"

if [ -z "${DATASETS-}" ]; then
  present market1501/Market-1501-v15.09.15 market1501 Market-1501-v15.09.15 && DATASETS=market
  present dukemtmc-reid/DukeMTMC-reID dukemtmc-reid DukeMTMC-reID && DATASETS="${DATASETS-} duke"
  if [ -z "${DATASETS-}" ]; then
    echo "Neither Market-1501 nor DukeMTMC-reID is under ${DATA_DIR:-datasets}: generated pedestrians with the quick flags." >&2
    DATASETS=synthetic QUICK=${QUICK:-1} SEEDS=${SEEDS:-0}
  fi
fi
LOSSES=${LOSSES:-$ALL_LOSSES}
SEEDS=${SEEDS:-0 1 2 3 4}
VARIANT=$(variant "$@")
case ${QUICK:-0} in
  0) QUICK_FLAGS=() ;;
  *) VARIANT=_quick$VARIANT ;;
esac

names=() datasets=() losses=() seeds=()
for seed in $SEEDS; do
  for dataset in $DATASETS; do
    for loss in $LOSSES; do
      names+=("${dataset}_${loss//\*/x}_s$seed$VARIANT")
      datasets+=("$dataset") losses+=("$loss") seeds+=("$seed")
    done
  done
done

[ ${#names[@]} -gt 0 ] || stop "nothing to run: LOSSES, DATASETS or SEEDS is blank"

to_do=()
for name in "${names[@]}"; do
  is_finished "$name" || to_do+=("$name")
done
echo "${#names[@]} runs, $((${#names[@]} - ${#to_do[@]})) of them finished before." >&2
if [ ${#to_do[@]} -gt 0 ]; then
  "$PYTHON" -m utils.results results --estimate "${to_do[@]}" >&2 || stop "the time can't be estimated, see above"
fi

# --------------------------------------------------------------------------------------------------------------- run it

finished=() skipped=() failed=() stopped=""
trap 'stopped=1' INT TERM # the training gets the signal, too, and ends after its step; nothing else is begun then

for i in "${!names[@]}"; do
  name=${names[$i]}
  if is_finished "$name"; then
    skipped+=("$name")
    continue
  fi
  command=("$PYTHON" train.py --loss "${losses[$i]}" --dataset "${datasets[$i]}" ${DATA_DIR:+--data-dir "$DATA_DIR"}
    ${QUICK_FLAGS[@]+"${QUICK_FLAGS[@]}"} "$@" --seed "${seeds[$i]}" --run-dir "runs/$name")
  [ -d "runs/$name" ] && command+=(--resume)
  if [ "${DRY_RUN:-0}" != 0 ]; then
    printf '%q ' "${command[@]}" && echo
    continue
  fi
  echo "[$((i + 1))/${#names[@]}] $name" >&2
  if "${command[@]}" && "$PYTHON" -m utils.results results --collect "runs/$name"; then
    finished+=("$name")
  else
    case $? in 130 | 143) stopped=1 ;; esac
    [ -n "$stopped" ] || failed+=("$name")
  fi
  [ -z "$stopped" ] || break
done

# --------------------------------------------------------------------------------------------------------------- report

[ "${DRY_RUN:-0}" = 0 ] || exit 0
echo "${#finished[@]} runs finished now, ${#skipped[@]} skipped (finished before), ${#failed[@]} failed." >&2
[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}" >&2
[ ${#failed[@]} -eq 0 ] || printf 'FAILED: %s\n' "${failed[@]}" >&2
if [ -n "$stopped" ]; then
  echo "Stopped. The same command goes on from here." >&2
  exit 130
fi
"$PYTHON" -m utils.results results || exit 1
[ ${#failed[@]} -eq 0 ]

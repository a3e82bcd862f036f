# What nsys.sh and ncu.sh share, for `source`: --out and --dry-run, further words in `flags`, and
# `run`, which says what it runs and runs it unless the run is dry.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} out=profiles/out dry=

flags=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [ -n "$dry" ] || "$@"
}

#!/bin/sh
# Runs the built wheel as people without a clone do, from a local index and nothing else:
#
#   scripts/campaigns/run_from_wheel.sh [uv|pipx]
#
# Needs uv (`pip install uv`) or pipx, and a package registry to fill the index from. Ends with the
# summary of `nf4 build sample`.
set -eu
with=${1:-uv}
project=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$project/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
index=$work/index

echo "filling $index: the wheel, and what it needs in the versions of constraints.txt" >&2
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$index" "$project"
"$python" -m pip download --quiet --constraint "$project/constraints.txt" --dest "$index" \
    "$index"/nf4_pipeline-*.whl
cd "$work"
case $with in
uv)
    UV_CACHE_DIR=$work/cache uvx --offline --no-index --find-links "$index" \
        --python "$("$python" -c 'import sys; print(sys.executable)')" \
        --from nf4-pipeline nf4 build sample
    ;;
pipx)
    PIPX_HOME=$work/pipx PIP_NO_INDEX=1 PIP_FIND_LINKS=$index PIP_EXTRA_INDEX_URL='' \
        pipx run --spec nf4-pipeline nf4 build sample
    ;;
*)
    echo "Error: $with is neither uv nor pipx." >&2
    exit 2
    ;;
esac

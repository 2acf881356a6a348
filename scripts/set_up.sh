#!/bin/sh
# Makes the environment in a folder, once:  scripts/set_up.sh PYTHON FOLDER run|dev|ci
#
# "run" is what `nf4` needs, "dev" also what tests and lint need; "ci" is "run" with what signs, and
# with a copy of this package in the folder, so that the folder can be cached with the kernels that
# were compiled for it. What is installed comes from pyproject.toml and constraints.txt, for this
# python, at this place: the stamp says so, and is written last. TORCH_INDEX names a package index to
# take torch from, such as the one with builds for CPUs. All that is said goes to stderr, so that
# stdout is the job's.
set -eu
python=$1 venv=$2 for=$3
stamp=$venv/.made-from
hint="make … PYTHON=/path/to/python3"

fail() {
    echo "Error: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python was not found. Name a python >= 3.11: $hint"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "python >= 3.11 is needed, and $python is $("$python" -V 2>&1). Name another: $hint"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
place="python $version in $PWD"
wanted=$(echo "$place"; cksum pyproject.toml constraints.txt)
made=$(cat "$stamp" 2>/dev/null || true)
case $made in
"$wanted
$for" | "$wanted
dev") exit 0 ;;
esac

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv)," \
        "or name another: $hint"
began=$(date +%s)
case $for in
run | ci) echo "Setting up $venv with python $version: once, a minute or less, 1.3 GB." >&2 ;;
dev) echo "Setting up $venv with python $version, and what tests and lint need: once, 2 GB." >&2 ;;
esac
if [ "$(echo "$made" | head -n 1)" != "$place" ]; then
    "$python" -m venv --clear "$venv" >&2
fi
echo "$place" >"$stamp"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install \
        --constraint constraints.txt "$@" >&2 ||
        fail "the packages could not be installed; pip says why above. Run make again to retry."
}
pip setuptools
if [ -n "${TORCH_INDEX:-}" ]; then
    pip --no-deps --index-url "$TORCH_INDEX" torch
fi
if [ "$for" = dev ]; then
    pip --no-build-isolation --editable '.[dev]'
elif [ "$for" = ci ]; then
    pip --no-compile --no-build-isolation '.[sign]'
else
    # Of its thousands of files a build imports some hundred; those are compiled below.
    pip --no-compile --no-build-isolation --editable .
fi
"$venv/bin/python" scripts/warm_up.py >&2 || fail "what was installed does not work; see above."
printf '%s\n%s\n' "$wanted" "$for" >"$stamp"
echo "Set up in $(($(date +%s) - began)) s." >&2

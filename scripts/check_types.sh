#!/usr/bin/env bash
# Check the types of the package as users get it: build the wheel, unpack it in a temporary folder, run mypy there.
# Type checkers do not follow the mapping of an editable install (`pruning/` is `prunegym.pruning`).
#
# Usage: scripts/check_types.sh [PYTHON]     PYTHON has the development tools; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${1:-.venv/bin/python}
# not made absolute with realpath: that would follow the link out of the virtual environment
[[ $python == */* && $python != /* ]] && python=$root/$python

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Built from a copy: setuptools leaves build/ behind, and a file deleted since would come back from there.
mkdir "$folder/source" "$folder/site"
cp -r pyproject.toml README.md LICENSE prunegym pruning envs agents "$folder/source"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$folder" "$folder/source"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/site" "$folder"/*.whl

cd "$folder/site"
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" prunegym

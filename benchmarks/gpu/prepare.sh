#!/usr/bin/env bash
# bash benchmarks/gpu/prepare.sh REPO: lays into REPO/.gpu what must travel to a GPU machine without a network (half a megabyte).
set -euo pipefail
cd "$1"
WHEELS="msgspec"  # what the machine's Python 3.12 lacks and the parts import
rm -rf .gpu && mkdir -p .gpu/whl
for name in $WHEELS; do
    version=$(uv run --quiet python -c "import importlib.metadata as m; print(m.version('$name'))")
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d .gpu/whl "$name==$version"
done
changed=$(git status --porcelain | head -1)
echo "$(git log -1 --format='%h %cs')${changed:+, with uncommitted changes}" > .gpu/commit
echo 'exec bash "$(dirname "$0")/../benchmarks/gpu/gpu_run.sh"' > .gpu/gpu_run.sh
du -sh .gpu

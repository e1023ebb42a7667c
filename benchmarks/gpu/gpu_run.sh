#!/usr/bin/env bash
# Runs all parts of the GPU benchmark (README.md): bash .gpu/gpu_run.sh after prepare.sh, or SMOKE=1 bash benchmarks/gpu/gpu_run.sh.
# PARTS="tests live": only those. OUT: where log, rows and report go. DEADLINE: seconds for all. PYTHON: the interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}; SMOKE=${SMOKE:-}
SCRATCH=$(mktemp -d); trap 'rm -rf "$SCRATCH"' EXIT
if [[ $SMOKE ]]; then OUT=$SCRATCH/out; export OMP_NUM_THREADS=1; fi  # a smoke run leaves nothing, and shares its cores
OUT=$(realpath -m "${OUT:-.gpu/out}"); mkdir -p "$OUT" "$SCRATCH/site/prospect_dst-0.1.0.dist-info"
# the project is not installed on a GPU machine, but preprocess and the model card ask for its version
printf 'Metadata-Version: 2.1\nName: prospect-dst\nVersion: 0.1.0\n' > "$SCRATCH/site/prospect_dst-0.1.0.dist-info/METADATA"
if ! $PYTHON -c "import msgspec" 2>/dev/null; then
    for wheel in .gpu/whl/*.whl; do $PYTHON -m zipfile -e "$wheel" "$SCRATCH/site" || exit 1; done
fi
if [[ $SMOKE ]]; then  # what the GPU machine does not have must not be imported
    for name in polars av ray; do echo "raise ImportError('the GPU machine has no $name')" > "$SCRATCH/site/$name.py"; done
fi
export SMOKE PYTHON OUT SCRATCH PYTHONPATH="$SCRATCH/site:$PWD" PYTHONUNBUFFERED=1 PYTHONWARNINGS="ignore,default:no CUDA graph" HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor PYTORCH_NVML_BASED_CUDA_CHECK=1
$PYTHON benchmarks/gpu/run.py 2>&1 | tee "$OUT/log.txt"

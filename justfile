# `uv run` builds the environment; nothing else to install.

# the main job on made-up data, under five minutes
demo *ARGS:
    uv run prospect-dst demo {{ARGS}}

# all tests
test *ARGS:
    uv run pytest -n 2 {{ARGS}}

# lint, format, types
check:
    uv run ruff check .
    uv run ruff format --check .
    uv run mypy
    uv run lint-imports --no-cache

# repair what can be repaired
fix:
    uv run ruff check --fix .
    uv run ruff format .

# docs/imports.svg, drawn from the code
import-graph:
    uv run python docs/import_graph.py

# what CI runs
ci:
    bash .ci/run

# preprocess against the plan's path, HF datasets and orjson (1.1 GB, some ten minutes, 16 GB of memory)
bench-preprocess *ARGS:
    uv run --group bench python benchmarks/preprocess/run.py {{ARGS}}

# train_step against the HF Trainer (CPU, and GPU where there is one; half an hour)
bench-trainer *ARGS:
    uv run --group bench python benchmarks/trainer/run.py {{ARGS}}

# the loader against HF datasets, MosaicML Streaming and litdata (a quarter of an hour)
bench-loader *ARGS:
    uv run --group bench python benchmarks/loader/run.py {{ARGS}}

# clips at once against one at a time, frames a second live, eight hours of it (an hour and a half; measurements stay in WORK)
bench-stream WORK *ARGS:
    uv run python benchmarks/stream/run.py --work {{WORK}} {{ARGS}}

# what the GPU benchmark runs, on tiny models and a CPU (a minute); on a GPU: benchmarks/gpu/README.md
bench-gpu-smoke:
    SMOKE=1 PYTHON="uv run --quiet python" bash benchmarks/gpu/gpu_run.sh

# a run killed twenty times at random moments, resumed each time: the same bits
kill:
    PROSPECT_DST_KILLS=20 uv run pytest tests/trainer/test_resume.py -k kills --timeout 1200

# kills, full disks, flipped bytes and garbage, TIMES times as many attempts as in the test suite
torture TIMES="20" *ARGS:
    PROSPECT_DST_TORTURE={{TIMES}} nice -n 10 uv run pytest tests/torture --timeout 3600 {{ARGS}}

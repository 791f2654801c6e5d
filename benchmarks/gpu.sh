#!/usr/bin/env bash
# All that a GPU is needed for, in under 9 minutes on one H100; run again, it does what it did not finish.
#
#     benchmarks/gpu.sh                               # results in benchmarks/results/<machine>, or in $OUT
#     benchmarks/gpu.sh --only trunk step_b           # some parts
#     benchmarks/gpu.sh --device cpu --tiny           # the same code path anywhere, with tiny models
#
# PYTHON says which interpreter (default: the project's .venv, else python3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../.venv/bin/python}"
[ -x "$python" ] || python=python3
exec "$python" "$here/gpu_parts.py" "$@"

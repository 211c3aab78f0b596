#!/usr/bin/env bash
# `make gpu`: everything that only a machine with a GPU can tell. Needs no network.
#
# 1. varstream builds with CUDA kernels against the torch that is installed.
# 2. The CUDA symbols of torch's stable ABI resolve.
# 3. The tests marked gpu pass, then a part of them under compute-sanitizer where it is installed.
# 4. Microbenchmarks, each checked for correctness first, go to bench/results/<gpu>.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no GPU here ($python finds no torch that sees a CUDA device)" >&2
  exit 1
fi

VARSTREAM_CUDA=ON "$python" -m pip install --quiet --no-build-isolation --no-deps .
rm -rf build/stamps  # this install is not the editable one that make test relies on

# From here on nothing may pick up the source tree in place of what was installed.
"$python" - <<'PYTHON'
import sys
from varstream import _C

symbols = _C.cuda_symbols()
for name, found in symbols.items():
    print(f"{name}: {'found' if found else 'MISSING'}")
sys.exit(not all(symbols.values()))
PYTHON

"$python" -m pytest -q -m gpu tests

export PATH=$PATH:/usr/local/cuda/bin
if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer not found: memcheck left out"
elif ! compute-sanitizer "$python" -c 'import torch; torch.zeros(1).cuda()' &>/dev/null; then
  echo "compute-sanitizer can't run on this device: memcheck left out"
else
  # Uncached allocations: every tensor gets its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q -m "gpu and not slow" tests/gpu/test_packing_gpu.py \
    -k "alignment or out_of_range or isolation"
fi

"$python" -m bench run --device cuda

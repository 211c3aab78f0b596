#!/usr/bin/env bash
# What only a machine with a GPU can tell. Needs no network.
#
#   bench/gpu.sh [STEP...]    PYTHON: the interpreter (python3); GPU_LOGS: where logs go (build/gpu)
#
# Steps, in order; `sanitize` and `bench` stand for their parts, none at all for everything:
#   build       varstream with CUDA kernels against the torch that is installed; the CUDA symbols of
#               torch's stable ABI resolve
#   test        the tests marked gpu
#   memcheck racecheck synccheck initcheck
#   memcheck-backward racecheck-backward synccheck-backward initcheck-backward
#   memcheck-head racecheck-head synccheck-head initcheck-head
#               small tests of attention and of the head's row kernels under compute-sanitizer, left out where it can't run
#   bench-dense bench-ragged bench-grouped bench-rest
#   bench-backward-64 bench-backward-128 bench-backward-ragged bench-backward-grouped
#   bench-backward-rest bench-chunks bench-sums
#   bench-head bench-head-shapes bench-head-kinds bench-logprobs bench-distillation
#   bench-stream-8k bench-stream-16k-full bench-stream-16k-lora
#   bench-stream-32k-MODEL bench-stream-64k-packed bench-stream-64k-MODEL bench-stream-128k-MODEL
#               (MODEL: qwen3-4b, qwen3-8b, llama-8b; PEFT must be installed)
#               microbenchmarks and training steps, each checked for correctness first, to bench/results/<gpu>.json
#
# A step that fails makes the script fail in the end; the steps after it still run, and what one
# has measured is stored as each case is done. No step may take longer than GPU_LIMIT seconds (590).
# A step given alone runs as it is; its exit code 77 says that it was left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
logs=${GPU_LOGS:-build/gpu}
limit=${GPU_LIMIT:-590}
tools=(memcheck racecheck synccheck initcheck)
sanitize=("${tools[@]}" "${tools[@]/%/-backward}" "${tools[@]/%/-head}")
bench=(bench-dense bench-ragged bench-grouped bench-rest bench-backward-64 bench-backward-128
  bench-backward-ragged bench-backward-grouped bench-backward-rest bench-chunks bench-sums
  bench-head bench-head-shapes bench-head-kinds bench-logprobs bench-distillation
  bench-stream-8k bench-stream-16k-full bench-stream-16k-lora
  bench-stream-32k-{qwen3-4b,qwen3-8b,llama-8b} bench-stream-64k-packed
  bench-stream-64k-{qwen3-4b,qwen3-8b,llama-8b} bench-stream-128k-{qwen3-4b,qwen3-8b,llama-8b})
all=(build test "${sanitize[@]}" "${bench[@]}")
left_out=77 # exit code of a step that can't run here

# What the sanitizers see, by words of test names (-k). Tile edges, head dims, groups that share a
# tile, lengths that lie, score modifiers, dropout; rows of a pack.
attention_files="tests/test_attention.py tests/test_attention_dropout.py tests/test_attention_kernel.py"
attention_small="head_shapes or head_groups or rows_that_no_sequence_holds or a_row_that_sees_nothing"
attention_most="$attention_small or awkward_lengths_at_tile_edges or lengths_that_lie or inert_tail or philox_bit_for_bit"
packing_some="alignment or out_of_range or isolation"
# All that the backward's files hold; the tests above differentiate as well.
backward_files="tests/test_attention_backward*.py"
backward_all="backward"
head_files="tests/test_softmax_rows.py tests/test_distillation_rows.py"

build() {
  "$python" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())'
  VARSTREAM_CUDA=ON "$python" -m pip install --quiet --no-build-isolation --no-deps . || return 1
  rm -rf build/stamps # this install is not the editable one that make test relies on
  "$python" - <<'PYTHON'
import sys
from varstream import _C

print(_C.build_info())
symbols = _C.cuda_symbols()
for name, found in symbols.items():
    print(f"{name}: {'found' if found else 'MISSING'}")
sys.exit(not all(symbols.values()))
PYTHON
}

tests() { "$python" -m pytest -q -m gpu "$@"; }

# sanitizer TOOL OPTIONS... -- pytest's arguments
sanitizer() {
  local tool=$1 options=()
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  PATH=$PATH:/usr/local/cuda/bin
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer not found"
    return $left_out
  fi
  if ! compute-sanitizer "$python" -c 'import torch; torch.zeros(1).cuda()' &>/dev/null; then
    echo "compute-sanitizer can't run on this device"
    return $left_out
  fi
  # Uncached allocations: every tensor has its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    ${options[@]+"${options[@]}"} "$python" -m pytest -q -m "gpu and not slow" "$@"
}

# Topics whose cases have steps of their own.
elsewhere='attention_(forward|backward|chunks)|tile_schedule|head|head_rows|logprobs|distillation|stream_gpu'

# Other kernels' shared memory and barriers are not ours to check. initcheck must see who writes.
ours=(--kernel-name kns=varstream)

step() {
  case $1 in
    build) build ;;
    test) tests tests ;;
    memcheck)
      # shellcheck disable=SC2086  # files are words
      sanitizer memcheck -- $attention_files tests/gpu/test_packing_gpu.py \
        -k "$attention_most or $packing_some"
      ;;
    racecheck | synccheck)
      # shellcheck disable=SC2086
      sanitizer "$1" "${ours[@]}" -- $attention_files -k "$attention_small"
      ;;
    initcheck)
      # shellcheck disable=SC2086
      sanitizer initcheck -- $attention_files -k "$attention_small"
      ;;
    racecheck-backward | synccheck-backward)
      # shellcheck disable=SC2086
      sanitizer "${1%-backward}" "${ours[@]}" -- $backward_files -k "$backward_all"
      ;;
    memcheck-backward | initcheck-backward)
      # shellcheck disable=SC2086
      sanitizer "${1%-backward}" -- $backward_files -k "$backward_all"
      ;;
    racecheck-head | synccheck-head)
      # shellcheck disable=SC2086
      sanitizer "${1%-head}" "${ours[@]}" -- $head_files
      ;;
    memcheck-head | initcheck-head)
      # shellcheck disable=SC2086
      sanitizer "${1%-head}" -- $head_files
      ;;
    bench-dense) run_cases 'attention_forward/dense_*' ;;
    bench-ragged) run_cases 'attention_forward/ragged_*_mha_*' 'attention_forward/short_*' ;;
    bench-grouped) run_cases 'attention_forward/ragged_*_gqa_*' 'tile_schedule' ;;
    bench-rest)
      local names
      names=$("$python" -m bench list --names --device cuda) || return 1
      # shellcheck disable=SC2046  # names are words
      run_cases $(grep -vE "^($elsewhere)/" <<<"$names")
      ;;
    bench-backward-64) run_cases 'attention_backward/dense_*_hd64_*' ;;
    bench-backward-128) run_cases 'attention_backward/dense_*_hd128_*' ;;
    bench-backward-ragged) run_cases 'attention_backward/ragged_*_mha_*' ;;
    bench-backward-grouped) run_cases 'attention_backward/ragged_*_gqa_*' ;;
    bench-backward-rest) run_cases 'attention_backward/short_*' 'attention_backward/deterministic_*' ;;
    bench-chunks) run_cases 'attention_chunks/chunk_*' ;;
    bench-sums) run_cases 'attention_chunks/sum_*' ;;
    bench-head) run_cases 'head/bf16_gpu' 'head/bf16_gpu_rows_*' ;;
    bench-head-shapes) run_cases 'head/bf16_gpu_classes_*' ;;
    bench-head-kinds) run_cases 'head/bf16_gpu_none' 'head/bf16_gpu_frozen' 'head/bf16_gpu_ignored_*' ;;
    bench-logprobs) run_cases 'logprobs/bf16_gpu_*' ;;
    bench-distillation) run_cases 'distillation/bf16_gpu_*' 'head_rows' ;;
    bench-stream-8k) run_steps 2 'stream_gpu/*_8k' ;;
    bench-stream-16k-full) run_steps 2 'stream_gpu/*_full_*_16k' ;;
    bench-stream-16k-lora) run_steps 2 'stream_gpu/*_lora_*_16k' ;;
    bench-stream-32k-qwen3-4b) run_steps 2 'stream_gpu/qwen3_4b_*_32k' ;;
    bench-stream-32k-qwen3-8b) run_steps 2 'stream_gpu/qwen3_8b_*_32k' ;;
    bench-stream-32k-llama-8b) run_steps 2 'stream_gpu/llama_8b_*_32k' ;;
    bench-stream-64k-packed) run_steps 1 'stream_gpu/*_packed_64k' ;;
    bench-stream-64k-qwen3-4b) run_steps 1 'stream_gpu/qwen3_4b_*_single_64k' ;;
    bench-stream-64k-qwen3-8b) run_steps 1 'stream_gpu/qwen3_8b_*_single_64k' ;;
    bench-stream-64k-llama-8b) run_steps 1 'stream_gpu/llama_8b_*_single_64k' ;;
    bench-stream-128k-qwen3-4b) run_steps 1 'stream_gpu/qwen3_4b_*_128k' ;;
    bench-stream-128k-qwen3-8b) run_steps 1 'stream_gpu/qwen3_8b_*_128k' ;;
    bench-stream-128k-llama-8b) run_steps 1 'stream_gpu/llama_8b_*_128k' ;;
  esac
}

run_cases() { "$python" -m bench run --device cuda "$@"; }

# run_steps ROUNDS PATTERN...: a training step takes seconds, so that few rounds fill a step here
run_steps() { run_cases --rounds "$@"; }

wanted=()
for name in "${@:-all}"; do
  case $name in
    all) wanted+=("${all[@]}") ;;
    sanitize) wanted+=("${sanitize[@]}") ;;
    bench) wanted+=("${bench[@]}") ;;
    *)
      if [[ " ${all[*]} " != *" $name "* ]]; then
        echo "bench/gpu.sh: no step $name; steps: ${all[*]} sanitize bench" >&2
        exit 2
      fi
      wanted+=("$name")
      ;;
  esac
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no GPU here ($python finds no torch that sees a CUDA device)" >&2
  exit 1
fi

if [ ${#wanted[@]} = 1 ]; then
  step "${wanted[0]}"
  exit
fi

mkdir -p "$logs"
failed=()
summary=()
for name in "${wanted[@]}"; do
  echo "=== $name"
  timeout "$limit" bash bench/gpu.sh "$name" 2>&1 | tee "$logs/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) summary+=("$name: ok") ;;
    "$left_out") summary+=("$name: left out, $(tail -n 1 "$logs/$name.log")") ;;
    124) summary+=("$name: FAILED, took longer than $limit s") && failed+=("$name") ;;
    *) summary+=("$name: FAILED, exit code $code") && failed+=("$name") ;;
  esac
  # Without a build the rest would test something else.
  if [ "$name" = build ] && [ "$code" != 0 ]; then break; fi
done
printf '%s\n' "=== summary" "${summary[@]}" | tee "$logs/summary.log"
[ ${#failed[@]} = 0 ]

#!/usr/bin/env bash
# Everything that wants a GPU, in one command: is it right there, how fast is it, and how much memory
# does it take, beside PyTorch. Nothing is downloaded.
#
#     benchmarks/gpu.sh FOLDER                  # all parts; those for which LIMIT seconds do not
#                                               # suffice (default: 540) are left out
#     benchmarks/gpu.sh FOLDER light base16     # these parts
#     benchmarks/gpu.sh --tiny FOLDER           # small sizes, to see on a CPU that it runs
#
# Parts, in this order:
#   tests     tests marked `accelerator`, and docs/programs: losses and steps against the CPU
#   parity    losses of a few steps of the light model, here and on the CPU
#   parity_b  the same of HuBERT base and ViT-B/16
#   light     seconds a step of configs/spoken_scenes.py's model, float32
#   base16    HuBERT base and ViT-B/16, both tuned, bfloat16, with XLA's attention and cuDNN's
#   large16   HuBERT large and tokens of BLIP-2, likewise
#   search    exact search of 1,000,000 x 256
#   light16   light in bfloat16
#   base      HuBERT base and ViT-B/16, float32 (TF32)
#   remat16   large16 with a batch of 256, activations recomputed
# The first three run side by side, the others one by one, each under its own time limit; one that
# fails or hangs costs the others nothing. A log of each part, its table, and report.txt, which is
# also printed, are in FOLDER. The status is the number of parts that failed.
#
# PYTHON=... chooses the interpreter (default: python3). Needed: the package's `train` extra for its
# audio and options, torch and transformers for the comparison, pytest for the tests.
set -u
cd "$(dirname "$0")/.."

tiny=
if [[ ${1:-} == --tiny ]]; then tiny=--tiny; shift; fi
if [[ $# -eq 0 || $1 == -* ]]; then sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2; fi
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift || exit 2
all=(tests parity parity_b light base16 large16 search light16 base remat16)
wanted=("${@:-${all[@]}}")
for name in "${wanted[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "gpu.sh: $name is no part; parts: ${all[*]}"; exit 2; }
done

python=${PYTHON:-python3}
limit=${LIMIT:-$([[ -n $tiny ]] && echo 3600 || echo 540)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
# Processes that compare with the CPU need both; without a GPU, the CPU alone.
if $python -c 'import jax; assert jax.default_backend() != "cpu"' 2>"$folder/backend.log"; then
  device=gpu
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
else
  device=cpu
  export JAX_PLATFORMS=cpu
fi
has() { $python -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }
torch_names() { [[ -n $has_torch ]] && echo "$@"; }
cudnn() { [[ $device == gpu ]] && echo ours-cudnn; }
has_torch=; has torch transformers && has_torch=yes
compiled=torch-compile; [[ -n $tiny ]] && compiled=  # takes a CPU minutes

failed=0
# part NAME SECONDS MODULES COMMAND...: run a part under its time limit.
part() {
  local name=$1 seconds=$2 modules=$3 began status left
  shift 3
  [[ " ${wanted[*]} " == *" $name "* ]] || return 0
  for module in $modules; do
    if ! has "$module"; then
      echo "$name: left out, $module is not installed" | tee "$folder/$name.status"
      return 0
    fi
  done
  left=$((limit - SECONDS))
  if [[ $left -lt 20 ]]; then
    echo "$name: left out, the limit of $limit s is reached" | tee "$folder/$name.status"
    return 0
  fi
  [[ $seconds -gt $left ]] && seconds=$left
  began=$SECONDS
  timeout -k 5 "$seconds" "$@" >"$folder/$name.txt" 2>"$folder/$name.log"
  status=$?
  left="$((SECONDS - began)) s"
  if [[ $status -eq 0 ]]; then
    echo "$name: ok, $left" | tee "$folder/$name.status"
  else
    [[ $status -eq 124 || $status -eq 137 ]] && left="stopped at its limit of $seconds s"
    echo "$name: FAILED with status $status, $left" | tee "$folder/$name.status"
    cat "$folder/$name.log" "$folder/$name.txt" | grep -v '^$' | tail -n 15 | cut -c-200 | sed 's/^/    /'
    return 1
  fi
}

rm -f "$folder"/*.{status,txt,log,jsonl}
{
  echo "date: $(date -u +%F)"
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
  echo "processors: $(nproc)"
  $python - <<'END'
import importlib.metadata as m, platform
names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "transformers")
found = [f"{n} {m.version(n)}" for n in names if any(d.name == n for d in m.distributions())]
print("Python", platform.python_version(), *found, sep=", ")
END
} >"$folder/machine.txt"
cat "$folder/machine.txt"

bench=($python benchmarks/train_step.py $tiny "--json=$folder/steps.jsonl")
few=(--steps 10 --rounds 5) many=(--steps 50 --rounds 7)
[[ -n $tiny ]] && few=(--steps 1 --rounds 1) many=(--steps 1 --rounds 1)
size() { [[ -z $tiny ]] && echo "--batch=$1"; }
tests=(tests/training/test_accelerator.py)
[[ -z $tiny ]] && tests+=(tests/docs/test_programs.py)

workers=$(($(nproc) / 4 > 4 ? 4 : $(nproc) / 4))
part tests 200 "pytest xdist" env JAX_DEFAULT_MATMUL_PRECISION=highest $python -m pytest -m accelerator -p no:cacheprovider "${tests[@]}" \
  -n $workers --dist load -rfs &
pids=$!
part parity 150 librosa "${bench[@]}" --parity --steps 5 & pids+=" $!"
part parity_b 200 librosa "${bench[@]}" --parity --setting=base --steps 3 & pids+=" $!"
for pid in $pids; do wait "$pid" || failed=$((failed + 1)); done

run() { part "$@" || failed=$((failed + 1)); }
run light 150 librosa "${bench[@]}" "${many[@]}" --variants ours ours-shard_map \
  $(torch_names torch $compiled ${compiled:+torch-graphs})
run base16 200 librosa "${bench[@]}" "${few[@]}" --setting=base --bfloat16 --sequence $(size 64) \
  --variants ours $(cudnn) $(torch_names torch $compiled)
run large16 200 librosa "${bench[@]}" "${few[@]}" --setting=large --bfloat16 --sequence $(size 64) \
  --variants ours $(cudnn) $(torch_names torch $compiled)
run search 100 "" $python benchmarks/search.py $tiny
run light16 120 librosa "${bench[@]}" "${many[@]}" --bfloat16 --variants ours $(cudnn) \
  $(torch_names torch $compiled)
run base 150 librosa "${bench[@]}" "${few[@]}" --setting=base --sequence $(size 32) \
  --variants ours $(torch_names torch $compiled)
run remat16 150 librosa "${bench[@]}" --steps 3 --rounds 3 --setting=large --bfloat16 --remat \
  --sequence $(size 256) --variants ours $(cudnn)

{
  echo
  cat "$folder/machine.txt"
  for name in "${all[@]}"; do cat "$folder/$name.status" 2>/dev/null; done
  for name in tests parity parity_b; do
    [[ -f $folder/$name.txt ]] && { echo; tail -n 12 "$folder/$name.txt"; }
  done
  echo
  # The same headings once.
  for name in light light16 base16 large16 base remat16; do cat "$folder/$name.txt" 2>/dev/null; done | awk '!seen[$0]++'
  echo
  cat "$folder/search.txt" 2>/dev/null
} >"$folder/report.txt"
cat "$folder/report.txt"
exit $failed

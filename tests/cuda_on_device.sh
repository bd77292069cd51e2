#!/usr/bin/env bash
# Everything that a machine with a GPU can show, in one run of some ten minutes: builds, checks every
# kernel alone and under compute-sanitizer, compares tokens with the CPU's, times kernels and a
# 7B model, and prints a short table last. Logs and models stay in FOLDER.
#
#     tests/cuda_on_device.sh [FOLDER]                   (default: build/cuda-on-device)
#     EMULATED=1 tests/cuda_on_device.sh [FOLDER]        the same on the emulator, on small shapes
#
# Needs nvcc (EMULATED: a C++ compiler), cmake, and a python3 (PYTHON names another) with numpy and
# cffi. ARCHITECTURES are CMake's, by default this GPU's own.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/cuda-on-device}
python=${PYTHON:-python3}
if [ -n "${EMULATED:-}" ]; then
    flags=(-DCUDA_ON_CPU=ON) few=(few) small=(small)
else
    flags=(-DCUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES:-native}") few=() small=()
fi
mkdir -p "$folder"
failures=0

step() { # NAME COMMAND...: its output in NAME.log, its end on the screen
    local name=$1 status
    shift
    "$@" > "$folder/$name.log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "ok      $name: $(tail -n 1 "$folder/$name.log")"
    else
        echo "FAILED  $name, status $status; the end of $folder/$name.log:"
        tail -n 15 "$folder/$name.log"
        failures=$((failures + 1))
    fi
    return $status
}

step configure cmake -S . -B "$folder" "${flags[@]}" || exit 1
step build cmake --build "$folder" --parallel --target llama cuda_kernels cuda_bench || exit 1
step kernels "$folder/cuda_kernels" "${few[@]}"
if [ -z "${EMULATED:-}" ] && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck; do
        step $tool compute-sanitizer --tool $tool --error-exitcode 1 "$folder/cuda_kernels" few
    done
else
    echo "-       memcheck, racecheck, initcheck: not run, there is no compute-sanitizer here"
fi
step bench "$folder/cuda_bench" "${small[@]}" && cat "$folder/bench.log"
export LLAMA_LIBRARY=$PWD/$folder/libllama.so
case $folder in /*) LLAMA_LIBRARY=$folder/libllama.so ;; esac
step tokens "$python" tests/cuda_on_device.py tokens "$folder" "${small[@]}"
step times "$python" tests/cuda_on_device.py times "$folder" "${small[@]}" && cat "$folder/times.log"
[ $failures -eq 0 ] && echo "all steps passed" || echo "$failures steps failed"
exit $((failures > 0))

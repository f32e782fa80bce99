#!/usr/bin/env bash
# Everything that only a GPU can show, part by part.
#
#     bench/gpu.sh                   the next parts, as long as 9 minutes last; call it until nothing is left
#     bench/gpu.sh --minutes 55      the same in a longer call
#     bench/gpu.sh kl gpt2           these parts
#     bench/gpu.sh --list            every part, and where it stands
#
# A part whose result is there is skipped, one that was killed runs again, and worlds go on where they were.
# A part that fails stops no other; it leaves OUT/<part>.failed and is tried again only where it is named.
# Exit status: 0, also where parts are left; 1 where one of the parts asked for has failed; 2 for a mistake.
#
#     OUT      folder of results and logs (results/gpu); worlds lie beside it, or in it if it is called otherwise
#     RUNS     folder that the worlds train in, weights and all (runs/gpu)
#     SEEDS    world seeds ("0 1 2")
#     PYTHON   the interpreter (.venv/bin/python if it is there, else python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${OUT:-results/gpu}
RUNS=${RUNS:-runs/gpu}
SEEDS=${SEEDS:-0 1 2}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
WORLDS=${OUT%/gpu}
export TQDM_DISABLE=1

parts=(tests kl decode-14b-8 decode-14b-40 responses-8b lora-14b cell-14b lora-8b cell-8b opd-14b gpt2)
parts+=(gpt2-cudnn gpt2-autotuned)
for world in 1 2; do
    for seed in $SEEDS; do parts+=("world$world-seed$seed"); done
    parts+=("world$world-report")
done
parts+=(calibration)

# Sets of a part: command, result, and the minutes that it is not begun without.
describe() {
    command=() result=$OUT/$1.json minutes=4
    case $1 in
    tests) command=(-m pytest -m gpu -rs) result=$OUT/tests.txt ;;
    kl | gpt2) command=("bench/$1.py" --out "$result") ;;
    gpt2-*) command=(bench/gpt2.py --ours "${1#gpt2-}" --out "$result") ;;
    decode-14b-*) command=(bench/sample.py --shape 14b --batch "${1#decode-14b-}" --out "$result") ;;
    responses-8b) command=(bench/sample.py --shape 8b --responses 4800 --out "$result") ;;
    lora-*) command=(bench/lora.py --shape "${1#lora-}" --out "$result") ;;
    cell-*) command=(bench/cell.py --shape "${1#cell-}" --out "$result") minutes=6 ;;
    opd-14b) command=(bench/opd.py --shape 14b --out "$result") ;;
    world[12]-seed*)
        command=(synth.py --world "${1:5:1}" --seed "${1##*seed}" --out "$RUNS/$1")
        result=$WORLDS/world${1:5:1}/$1/summary.json minutes=8
        ;;
    world[12]-report)
        local number=${1:5:1}
        command=(synth.py report --world "$number" --out "$WORLDS/world$number")
        result=$WORLDS/world$number/report-world$number/report.json minutes=1
        ;;
    calibration) command=(bench/calibrate.py --results "$OUT" --worlds "$WORLDS" --out "$result") minutes=1 ;;
    *) return 1 ;;
    esac
}

# What a world leaves that is no weights: numbers, tables and figures, all of them or none; and how long it took.
keep_world() { # name, seconds, whether it began from nothing
    local folder
    folder=$(dirname "$result")
    rm -rf "$folder.tmp"
    mkdir -p "$folder.tmp" || return
    (cd "$RUNS/$1" && find . \( -name '*.json' -o -name '*.csv' -o -name '*.png' -o -name '*.jsonl' \) \
        ! -path '*/model/*' ! -path '*/resume/*' -print0 | xargs -0 tar -cf -) | tar -xf - -C "$folder.tmp" || return
    echo "{\"seconds\": $2, \"from_nothing\": $3}" >"$folder.tmp/wall.json" || return
    rm -rf "$folder"
    mv "$folder.tmp" "$folder"
}

state() {
    if [ -e "$result" ]; then echo done; elif [ -e "$OUT/$1.failed" ]; then echo failed; else echo "to do"; fi
}

run_part() { # name, seconds
    local log=$OUT/$1.log status began=$SECONDS from_nothing=true
    [ -e "$RUNS/$1" ] && from_nothing=false
    echo "$1: $PYTHON ${command[*]}"
    rm -f "$OUT/$1.failed"
    timeout -k 10 "$2" "$PYTHON" "${command[@]}" >"$log.tmp" 2>&1
    status=$?
    mv "$log.tmp" "$log"
    if [ "$status" -eq 0 ]; then
        case $1 in
        tests) cp "$log" "$result.tmp" && mv "$result.tmp" "$result" ;;
        world*-seed*) keep_world "$1" $((SECONDS - began)) "$from_nothing" ;;
        esac
        [ -e "$result" ] || { echo "it ended without $result" >>"$log" && status=70; }
    fi
    tail -n 12 "$log"
    echo "$1: status $status after $((SECONDS - began)) s; all it said is in $log"
    case $status in
    0) ;;
    124 | 129 | 130 | 137 | 143) echo "$1: cut off; it runs again at the next call" ;;
    *) echo "$status" >"$OUT/$1.failed" ;;
    esac
}

limit=9 named=()
while [ $# -gt 0 ]; do
    case $1 in
    --minutes)
        limit=${2:-}
        shift
        case $limit in '' | *[!0-9]* | 0) echo "--minutes needs a whole number" >&2 && exit 2 ;; esac
        ;;
    --list)
        for part in "${parts[@]}"; do describe "$part" && printf '%-16s %-7s %s\n' "$part" "$(state "$part")" "$result"; done
        exit 0
        ;;
    -*) echo "no option $1; see the head of bench/gpu.sh" >&2 && exit 2 ;;
    *)
        describe "$1" || { echo "no part $1; bench/gpu.sh --list names them" >&2 && exit 2; }
        named+=("$1")
        ;;
    esac
    shift
done

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "$PYTHON: no torch that sees a CUDA device; name another by PYTHON=" >&2 && exit 2; }
mkdir -p "$OUT" "$RUNS" || exit 2
command -v nvidia-smi >/dev/null && nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1

end=$((SECONDS + 60 * limit)) begun=0 failed=() left=()
for part in "${named[@]:-${parts[@]}}"; do
    describe "$part"
    before=$(state "$part")
    seconds=$((end - SECONDS))
    if [ "$before" = done ]; then
        [ ${#named[@]} -gt 0 ] && echo "$part: done; to repeat it, delete $result"
    elif [ "$before" = failed ] && [ ${#named[@]} -eq 0 ]; then
        failed+=("$part")
    elif [[ $part == *report || $part == calibration ]] && [ ${#left[@]} -gt 0 ] && [ ${#named[@]} -eq 0 ]; then
        left+=("$part") # it is about the others
    elif [ "$begun" -eq 1 ] && [ "$seconds" -lt $((60 * minutes)) ]; then
        left+=("$part")
    else
        begun=1
        run_part "$part" "$((seconds > 30 ? seconds : 30))"
        case $(state "$part") in failed) failed+=("$part") ;; 'to do') left+=("$part") ;; esac
    fi
done
[ ${#left[@]} -gt 0 ] && echo "left for the next call: ${left[*]}"
[ ${#failed[@]} -gt 0 ] && echo "failed, tried again only where named: ${failed[*]}" && exit 1
exit 0

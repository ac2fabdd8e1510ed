# Runs the stages of a check one after the other, also after a failure, and ends with a table: source it, call `stage` for
# each, then `summary`, whose exit status is 1 if a stage failed. In the root of the repository.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
names=() outcomes=() seconds=()

stage() {  # stage NAME COMMAND...
    local start=$SECONDS outcome=passed
    printf '\n==== %s: %s\n' "$1" "${*:2}"
    "${@:2}" || outcome="FAILED (exit status $?)"
    names+=("$1") outcomes+=("$outcome") seconds+=($((SECONDS - start)))
}

summary() {
    local i failed=0
    printf '\n==== summary\n'
    for i in "${!names[@]}"; do
        printf '%-15s %3d min %02d s  %s\n' "${names[i]}" $((seconds[i] / 60)) $((seconds[i] % 60)) "${outcomes[i]}"
        [[ ${outcomes[i]} == passed ]] || failed=1
    done
    printf '%-15s %3d min %02d s\n' total $((SECONDS / 60)) $((SECONDS % 60))
    return $failed
}

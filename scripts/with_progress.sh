# with_progress COMMAND ...: pip's own bars where there is a terminal; elsewhere what it is at, every few
# seconds, and all that it has said if it fails. Sourced by install.sh and install_torch.sh.
with_progress() {
    if [ -t 1 ]; then "$@"; return; fi
    local log pid code=0 waited=0
    log="$(mktemp)"
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM  # a process in the background does not hear Ctrl-C
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        [ $((waited % 5)) = 0 ] || continue
        echo "... $waited s: $(grep -E '^ *(Collecting|Downloading|Using cached|Building|Installing)' "$log" |
            tail -1 | sed 's/^ *//' | cut -c1-65)"
    done
    wait "$pid" || code=$?
    trap - INT TERM
    [ "$code" = 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$code"
}

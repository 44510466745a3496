#!/usr/bin/env bash
# The daemon spoken to by hand: one JSON object a line, over its Unix socket. Any language can do this.
#
#     examples/socat.sh [SIZE]      (SIZE of the model's VRAM, such as 2G; default 100M)
#
# Needs socat and a running daemon; see examples/README.md. docs/protocol.md has every method.
set -euo pipefail

socket=${GPUSCHED_SOCKET:-/tmp/gpusched.sock}
size=${1:-100M}
python=${PYTHON:-$(command -v python3)} # one that has gpusched installed

# Sends one request and prints the answer. Without -t socat would wait for it half a second only.
ask() {
    printf '%s\n' "$1" | socat -t 600 - "UNIX-CONNECT:$socket"
}

# The same, and ends the script when the answer is an error.
must() {
    local answer
    answer=$(ask "$1")
    printf '%s\n' "$answer"
    grep -q '^{"ok": *true' <<<"$answer"
}

# The command is a list of strings. A request without "env" gets your PATH and your home from the user database, not
# from this shell; so the program's path is absolute here.
must '{"method": "run", "params": {"name": "example", "cmd": ["'"$python"'", "-m", "gpusched.workload", "--vram", "'"$size"'"]}}'
trap 'ask "{\"method\": \"kill\", \"params\": {\"name\": \"example\"}}"' EXIT

# It is ready when it says so in its log (a program that loads a model may take minutes).
for ((tries = 0; tries < 600; tries++)); do
    if ask '{"method": "logs", "params": {"name": "example"}}' | grep -q 'ready digest'; then break; fi
    sleep 0.1
done

must '{"method": "freeze", "params": {"name": "example"}}'
must '{"method": "thaw", "params": {"name": "example"}}'

# A connection may send any number of requests; answers come in their order, and "id" comes back with them.
printf '%s\n' '{"id": 1, "method": "freeze", "params": {"name": "example"}}' \
    '{"id": 2, "method": "thaw", "params": {"name": "example"}}' | socat -t 600 - "UNIX-CONNECT:$socket"

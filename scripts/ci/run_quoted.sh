#!/usr/bin/env bash
# Runs a command whose messages may hold words of strangers:  run_quoted.sh LOG COMMAND…
#
# Names and texts of a model reach the log of a CI step. GitHub Actions obeys lines of a log that look
# like workflow commands; between the two lines printed here it obeys none. Stdout is the command's
# own; what it writes on stderr also goes into the file LOG.
set -euo pipefail
log=$1
shift
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
echo "::stop-commands::$token" >&2
trap 'echo "::$token::" >&2' EXIT
{ "$@" 2>&1 >&3 | tee -- "$log" >&2; } 3>&1

#!/usr/bin/env bash
# Runs a command as the first process of a container: init.sh COMMAND...
#
# The first process of a container ignores signals that it does not handle, and all others are killed when it ends. So this script
# passes SIGTERM and SIGINT on, and stays for another second after the command has ended, in which the last messages are written.
set -u
trap 'kill -TERM "${!-}"' TERM INT
"$@" &
child=$!
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, but not yet the command
  wait "$child"
done
wait "$child"
status=$?
sleep 1
exit "$status"

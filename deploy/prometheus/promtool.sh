#!/usr/bin/env bash
# Puts promtool into a folder, out of Debian's package prometheus, which is not installed and starts no service:
#   deploy/prometheus/promtool.sh build/bin
# It needs apt-get and dpkg, and Debian's packages within reach; it ends with 1, and says so, where they are not.
set -euo pipefail
to=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fetch() { timeout 120 apt-get download -qq prometheus >/dev/null 2>&1; }
if ! { fetch || { timeout 120 apt-get update -qq >/dev/null 2>&1 && fetch; }; }; then
    echo "promtool cannot be had: Debian's package prometheus is not within reach" >&2
    exit 1
fi
dpkg --fsys-tarfile prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool
mv usr/bin/promtool "$to/promtool"

#!/bin/sh
# Debian packages that only the tests need: Redis 7.0 as a second server beside the embedded one, Chromium for the page.
set -eu
missing=""
command -v redis-server >/dev/null || missing="redis-server"
command -v chromium >/dev/null || missing="$missing chromium"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make test needs these Debian packages: $missing" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null

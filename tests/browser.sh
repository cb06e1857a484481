#!/usr/bin/env bash
# Installs the browser that tests/test_serve_page.py drives, where that is one command. Without it those tests skip.
set -u
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no chromium here: the tests of the page will be skipped (apt-get install chromium)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
    echo "chromium could not be installed: the tests of the page will be skipped" >&2
exit 0

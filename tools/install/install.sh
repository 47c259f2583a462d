#!/bin/sh
# Installs what is missing of packages.txt. Says what it is about to do first.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
want=$(sed 's/#.*//' "$here/packages.txt" | tr -s ' \n' ' ')
missing=
for p in $want; do
	dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
	echo "installing Debian packages:$missing"
	if [ "$(id -u)" != 0 ]; then
		echo "this needs root: sudo apt-get install$missing" >&2
		exit 3
	fi
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing </dev/null >/dev/null
fi
if ! command -v go >/dev/null 2>&1 && [ ! -x /usr/local/go/bin/go ]; then
	echo "Go 1.26 is missing. Debian 12 has an older one: unpack the release from the Go site to /usr/local/go." >&2
	exit 3
fi

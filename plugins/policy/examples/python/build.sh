#!/bin/sh
# Makes the policy one program: build.sh OUTPUT. Needs protoc; the program needs Debian's
# python3-grpcio, python3-protobuf and python3-cryptography.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/app"
protoc -I "$here/../.." --python_out="$work/app" "$here/../../policy.proto"
cp "$here/__main__.py" "$work/app/"
# A zip whose entries have one time makes the same file, and checksum, every time.
find "$work/app" -exec touch -d @1000000000 {} +
/usr/bin/python3 -m zipapp "$work/app" -p "/usr/bin/python3 -I" -o "$1"

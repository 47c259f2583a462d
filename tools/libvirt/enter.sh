# Sourced first by the stories: what they need is built unless CKAGENT (the binary)
# and GUEST (a directory with vmlinux and initrd) say where it is, and the story goes
# on inside host.sh.
if [ "${1:-}" != --inside ]; then
	root=$(cd "$here/../.." && pwd)
	if [ -z "${CKAGENT:-}" ]; then
		(cd "$root" && go build -o bin/ckagent ./cmd/ckagent)
		export CKAGENT=$root/bin/ckagent
	fi
	if [ -z "${GUEST:-}" ]; then
		GUEST=$(mktemp -d /tmp/ckagent-guest.XXXXXX)
		trap 'rm -rf "$GUEST"' EXIT
		export GUEST
		(cd "$root" && go run ./tools/guest/cmd/guest linux) | while IFS='=' read -r name path; do
			case $name in
			kernel) cp "$path" "$GUEST/vmlinux" ;;
			initrd) cp "$path" "$GUEST/initrd" ;;
			esac
		done
	fi
	status=0
	"$here/host.sh" "$0" --inside || status=$?
	exit "$status"
fi

#!/bin/bash
# host.sh COMMAND...: runs a command where a libvirtd of its own runs, as root, on a
# machine without systemd: in mount, pid and network namespaces of its own, with
# empty directories for libvirt and ckagent in /etc, /var and /run, and a user
# libvirt-qemu that exists nowhere else. A libvirtd of the host's is neither seen
# nor touched, and everything ends with the command.
#
# LAB is a directory for the command's files and the daemon's log; one is made, and
# removed, if it is not set.
set -euo pipefail

fail() { echo "host.sh: $*" >&2; exit 1; }

if [ "${1:-}" != --inside ]; then
	[ "$(id -u)" = 0 ] || fail "namespaces and QEMU under another user need root"
	for program in libvirtd virtlogd virsh qemu-system-x86_64 unshare; do
		command -v "$program" >/dev/null || fail "$program is missing (tools/install/install.sh)"
	done
	made=
	if [ -z "${LAB:-}" ]; then
		made=$(mktemp -d /tmp/ckagent-libvirt.XXXXXX)
		export LAB=$made
	fi
	chmod 755 "$LAB" # QEMU, another user, has to get to its files
	status=0
	# What is bound to here must be there; it is taken away if it was not.
	new=
	for dir in /etc/libvirt /var/lib/libvirt /run/libvirt /var/log/libvirt /var/cache/libvirt /run/ckagent /var/lib/ckagent-restored; do
		[ -d "$dir" ] || { mkdir -p "$dir"; new="$new $dir"; }
	done
	unshare --mount --pid --net --fork --kill-child --mount-proc "$0" --inside "$@" || status=$?
	for dir in $new; do rmdir "$dir" 2>/dev/null || true; done
	[ -z "$made" ] || rm -rf "$made"
	exit "$status"
fi
shift

ip link set lo up
for dir in /etc/libvirt /var/lib/libvirt /run/libvirt /var/log/libvirt /var/cache/libvirt /run/ckagent /var/lib/ckagent-restored; do
	mount -t tmpfs -o mode=755 tmpfs "$dir"
done
for db in passwd group; do
	cp "/etc/$db" "/run/libvirt/$db"
	grep -q '^libvirt-qemu:' "/etc/$db" || case $db in
	passwd) echo 'libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin' ;;
	group) echo 'libvirt-qemu:x:64055:' ;;
	esac >>"/run/libvirt/$db"
	grep -q '^kvm:' "/etc/$db" || [ "$db" = passwd ] || echo 'kvm:x:64056:' >>"/run/libvirt/$db"
	mount --bind "/run/libvirt/$db" "/etc/$db"
done
# As distributions have it: QEMU under a user of its own, the seccomp sandbox on.
# Not as they have it: no security driver, since this has to run where the kernel
# has no AppArmor, and no cgroups, since those of the host are not to be changed.
cat >/etc/libvirt/qemu.conf <<-END
	user = "libvirt-qemu"
	group = "libvirt-qemu"
	seccomp_sandbox = 1
	security_driver = "none"
	cgroup_controllers = [ ]
END
cat >/etc/libvirt/libvirtd.conf <<-END
	auth_unix_rw = "none"
	log_outputs = "3:file:$LAB/libvirtd.log"
END
export LIBVIRT_DEFAULT_URI=qemu:///system
virtlogd 2>>"$LAB/libvirtd.log" &
libvirtd 2>>"$LAB/libvirtd.log" &
echo $! >/run/libvirt/libvirtd.lab
for _ in $(seq 300); do
	if [ -S /run/libvirt/libvirt-sock ] && virsh version >/dev/null 2>&1; then
		# The first process of a pid namespace takes all others with it.
		status=0
		"$@" || status=$?
		exit "$status"
	fi
	sleep 0.1
done
cat "$LAB/libvirtd.log" >&2
fail "libvirtd did not come up within 30 s"

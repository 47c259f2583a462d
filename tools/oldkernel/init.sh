#!/bin/sh
# Init of the old kernel's machine: run what comes by the second serial port, a
# line at a time, and answer
#
#	@@ <exit code> <bytes of stdout> <bytes of stderr>
#
# followed by the two. Nothing else is ever sent.
export PATH=/bin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /run /tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/system
ip link set lo up
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo "@@ 0 0 0" >&3
while read -r line <&3; do
	# New files each time, and a fixed length of them: what a command left running
	# may still write to the old ones.
	rm -f /tmp/.out /tmp/.err
	(eval "$line") >/tmp/.out 2>/tmp/.err 3>&- </dev/null
	code=$? out=$(wc -c </tmp/.out) err=$(wc -c </tmp/.err)
	echo "@@ $code $out $err" >&3
	head -c "$out" /tmp/.out >&3
	head -c "$err" /tmp/.err >&3
done
poweroff -f

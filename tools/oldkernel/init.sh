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
	(eval "$line") >/tmp/.out 2>/tmp/.err 3>&- </dev/null
	code=$?
	echo "@@ $code $(wc -c </tmp/.out) $(wc -c </tmp/.err)" >&3
	cat /tmp/.out /tmp/.err >&3
done
poweroff -f

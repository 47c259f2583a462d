#!/bin/bash
# manners.sh: what libvirt and its users can still do with a domain that ckagent
# protects, and what becomes of it when ckagent or libvirtd ends at the worst moment.
# Run as root; it brings a libvirtd of its own (host.sh) and leaves nothing.
#
#   a domain with a qcow2 disk that a guest writes and fsyncs files to, protected by
#                          ten checkpoints and two agents, each of which is killed
#   kill -9, SIGSTOP of ckagent and kill -9 of libvirtd inside a pause: the guest
#                          runs on, libvirt knows it, nothing stays in QEMU
#   snapshot, blockcommit, managedsave, start
#   shutdown, start        the last fsynced file is there, and every other
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/enter.sh"
. "$here/domain.sh"

say "a domain with a disk"
truncate -s 64M "$LAB/disk.raw"
mkfs.ext4 -q -F "$LAB/disk.raw"
qemu-img convert -O qcow2 "$LAB/disk.raw" "$LAB/disk.qcow2"
rm "$LAB/disk.raw"
define_domain "GD_WS=16 GD_RATE=2000 GD_DISK=vda GD_FILES=disk GD_FILES_MS=20 GD_POWER=1" \
	"<disk type='file'><driver name='qemu' type='qcow2'/><source file='$LAB/disk.qcow2'/><target dev='vda' bus='virtio'/></disk>" hunter2
start_domain

protect() {
	"$CKAGENT" attach "$PID" --store "$STORE" --interval 400ms --keep-last 0 2>>"$LAB/attach.log" &
	agent=$!
}
more_than() { [ "$(taken)" -gt "$1" ]; }

say "ten checkpoints, and ckagent killed between and in them"
for n in 4 9; do
	protect
	until_true 60 more_than "$n" || die "attach: $(cat "$LAB/attach.log")"
	kill -9 "$agent"
	wait "$agent" 2>/dev/null || true # killed
	until_true 5 is running || die "the domain is $(state)"
done

# strike SIGNAL VICTIM: sends a signal to the agent or to libvirtd while the domain
# stands still for a checkpoint. In mode stop the pause is long enough to hit.
strike() {
	local round victim
	for round in 1 2 3 4 5 6; do
		"$CKAGENT" checkpoint "$PID" --store "$STORE" --mode stop 2>"$LAB/struck.log" &
		agent=$!
		victim=$agent
		[ "$2" = agent ] || victim=$(cat /run/libvirt/libvirtd.lab)
		while kill -0 "$agent" 2>/dev/null; do
			if is paused; then
				kill "-$1" "$victim"
				return
			fi
		done
		# Through libvirt a guardian that still takes the disks' nodes of a dead
		# agent out of QEMU meets the next one, which then fails and is repeated.
		wait "$agent" || sleep 0.5
	done
	die "no pause was hit in $round rounds: $(cat "$LAB/struck.log")"
}
# A machine that goes on says so on its console.
alive() { said "$from" '^TICK '; }

say "kill -9 of ckagent inside a pause"
strike KILL agent
from=$(mark)
until_true 3 is running || die "the domain stays $(state)"
until_true 10 alive || die "the guest stands still"
wait "$agent" 2>/dev/null || true # killed

say "ckagent frozen inside a pause"
strike STOP agent
from=$(mark)
until_true 3 is running || die "the domain stays $(state)"
until_true 10 alive || die "the guest stands still"
wait "$agent" 2>/dev/null || true # its guardian ended it

say "kill -9 of libvirtd inside a pause"
strike KILL libvirtd
from=$(mark)
until_true 10 alive || die "the guest stands still: $(cat "$LAB/struck.log")"
wait "$agent" && die "a checkpoint over a connection that was lost"
grep -q . "$LAB/struck.log" || die "it did not say why"
status=0
"$CKAGENT" checkpoint "$PID" --store "$STORE" 2>"$LAB/refusal" || status=$?
[ "$status" = 3 ] && grep -q "start libvirt's daemon" "$LAB/refusal" || die "without libvirtd: exit $status, $(cat "$LAB/refusal")"
libvirtd 2>>"$LAB/libvirtd.log" &
echo $! >/run/libvirt/libvirtd.lab
until_true 30 is running || die "libvirtd, restarted, finds the domain $(state)"

say "a domain that its user paused stays paused"
virsh suspend demo >/dev/null
"$CKAGENT" checkpoint "$PID" --store "$STORE" >/dev/null 2>"$LAB/paused.log" || die "checkpoint of a paused domain: $(cat "$LAB/paused.log")"
is paused || die "the domain is $(state)"
virsh resume demo >/dev/null

say "its password is in no checkpoint, and is asked for"
! grep -rl hunter2 "$STORE" --include=manifest.json || die "a password was recorded"
status=0
"$CKAGENT" export demo --store "$STORE" --format libvirt -o "$LAB/demo.save" 2>"$LAB/refusal" || status=$?
[ "$status" = 3 ] && grep -q 'security-info' "$LAB/refusal" || die "exit $status: $(cat "$LAB/refusal")"
virsh dumpxml --security-info --migratable demo >"$LAB/full.xml"
"$CKAGENT" export demo --store "$STORE" --format libvirt --xml "$LAB/full.xml" -o "$LAB/demo.save" 2>/dev/null || die "export"
virsh save-image-dumpxml --security-info "$LAB/demo.save" | grep -q hunter2 || die "the image lacks the password"

say "snapshot and blockcommit"
virsh snapshot-create-as demo s1 --disk-only --atomic --no-metadata --diskspec "vda,file=$LAB/over.qcow2" >/dev/null || die snapshot
"$CKAGENT" checkpoint "$PID" --store "$STORE" --json >"$LAB/overlay.json" || die "checkpoint of the overlay"
overlay=$(field id <"$LAB/overlay.json")
virsh blockcommit demo vda --active --pivot --wait >/dev/null || die blockcommit
"$CKAGENT" checkpoint "$PID" --store "$STORE" >/dev/null || die "checkpoint after blockcommit"
untouched

say "managedsave and start"
virsh managedsave demo >/dev/null || die managedsave
is "shut off" || die "the domain is $(state)"
from=$(mark)
virsh start demo >/dev/null || die "start after managedsave"
PID=$(cat /run/libvirt/qemu/demo.pid)
until_true 20 alive || die "the guest does not carry on"
"$CKAGENT" checkpoint "$PID" --store "$STORE" >/dev/null || die "checkpoint after managedsave"
untouched
healthy

say "no overlay is put between libvirt and its images"
status=0
"$CKAGENT" checkpoint "$PID" --store "$STORE" --disks overlay 2>"$LAB/refusal" || status=$?
[ "$status" = 3 ] && grep -q "libvirt manages this VM" "$LAB/refusal" || die "overlay: exit $status, $(cat "$LAB/refusal")"
untouched

say "shutdown and start: the last fsynced file is there"
from=$(mark)
virsh shutdown demo >/dev/null || die shutdown
until_true 60 is "shut off" || die "the guest does not shut down: $(state)"
said "$from" '^POWER pressed' || die "it was not asked to"
wrote=$(last "$from" wrote)
[ "${wrote:-0}" -gt 0 ] || die "the guest wrote no files"
qemu-img check -q "$LAB/disk.qcow2" || die "the disk is damaged"
[ "$(qemu-img info "$LAB/disk.qcow2" | grep -c backing)" = 0 ] || die "the disk has a backing file now"
from=$(mark)
start_domain
verified() { said "$from" '^FILES ready '; }
until_true 20 verified || die "the guest does not find its files"
next=$(last "$from" next)
# The last one may lack its name: each file is fsynced, and its renaming only by the next.
[ "$next" -ge $((wrote - 1)) ] || die "files up to $next of $wrote"
echo "$wrote files fsynced before, next is $next"
healthy
virsh destroy demo >/dev/null

say "a checkpoint with the overlay comes back by itself, with its disk"
"$CKAGENT" restore "$overlay" --store "$STORE" --json >"$LAB/restore.json" || die "restore: $(cat "$LAB/restore.json")"
own=$(field qemu_pid <"$LAB/restore.json")
(
	SERIAL=$(field run_dir <"$LAB/restore.json")/vm/charserial0.log
	wrote() { [ "$(serial | grep -c '^FILES wrote=')" -ge 4 ]; }
	until_true 30 wrote || die "the guest does not carry on"
	healthy
) || exit 1
kill -9 "$own"
qemu-img check -q "$LAB/disk.qcow2" || die "the disk is damaged"
say "done"

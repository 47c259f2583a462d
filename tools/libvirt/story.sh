#!/bin/bash
# story.sh: a domain's checkpoint, its end, and its return to libvirt. Run as root;
# it brings a libvirtd of its own (host.sh) and leaves nothing.
#
#   define, start           by libvirt: QEMU under another user, sandboxed
#   attach, checkpoint      through libvirt; its events show pauses and nothing else
#   kill -9 of QEMU
#   ckagent restore         a QEMU of its own, lazily: the guest carries on
#   ckagent export, virsh restore
#                           the domain is libvirt's again, and the guest carries on
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/enter.sh"
. "$here/domain.sh"

say "define and start"
define_domain "GD_WS=16 GD_RATE=2000 GD_SWEEP=8192"
start_domain
[ "$(stat -c %U "/proc/$PID")" = libvirt-qemu ] || die "QEMU runs as $(stat -c %U "/proc/$PID")"
grep -q '^Seccomp:[[:space:]]*2' "/proc/$PID/status" || die "QEMU is not sandboxed"
virsh dumpxml --migratable demo >"$LAB/before.xml"
virsh event demo --event lifecycle --loop >"$LAB/events" &
events=$!

say "attach: two checkpoints, one a second"
"$CKAGENT" attach "$PID" --store "$STORE" --interval 1s 2>"$LAB/attach.log" &
agent=$!
more_than() { [ "$(taken)" -gt "$1" ]; }
until_true 30 more_than 1 || die "attach: $(cat "$LAB/attach.log")"
kill -INT "$agent"
wait "$agent" || true # by a signal, as it should
say "one checkpoint by hand"
"$CKAGENT" checkpoint "$PID" --store "$STORE" --json >"$LAB/checkpoint.json" || die "checkpoint"
tick=$(serial | grep -Eo '^TICK [0-9]+' | tail -n 1 | cut -d' ' -f2)
sweeps=$(last 0 sweeps)
echo "pause $(($(field pause_ns <"$LAB/checkpoint.json") / 1000)) us, mode $(field mode <"$LAB/checkpoint.json"), tick $tick"
is running || die "the domain is $(state)"
untouched
virsh dumpxml --migratable demo | diff "$LAB/before.xml" - || die "the domain's description has changed"

say "libvirt's events: pauses that end, and nothing else"
pauses=$(taken)
resumed() { [ "$(grep -c Resumed "$LAB/events")" -ge "$pauses" ]; }
until_true 5 resumed || die "$pauses checkpoints: $(cat "$LAB/events")"
kill "$events"
wait "$events" 2>/dev/null || true # by the signal
grep -Eo 'Suspended|Resumed|Started|Stopped|Shutdown|Crashed|PMSuspended' "$LAB/events" | paste -s -d' ' >"$LAB/sequence"
grep -Eq '^Suspended Resumed( Suspended Resumed)*$' "$LAB/sequence" || die "events: $(cat "$LAB/sequence")"

say "a living domain is not restored next to itself"
status=0
"$CKAGENT" restore demo --store "$STORE" 2>"$LAB/refusal" || status=$?
[ "$status" = 3 ] && grep -q 'libvirt says' "$LAB/refusal" || die "exit $status: $(cat "$LAB/refusal")"

say "kill -9 of QEMU"
kill -9 "$PID"
until_true 20 is "shut off" || die "libvirt did not notice"

say "ckagent restore: a QEMU of its own"
"$CKAGENT" restore demo --store "$STORE" --json >"$LAB/restore.json" || die "restore: $(cat "$LAB/restore.json")"
own=$(field qemu_pid <"$LAB/restore.json")
log=$(field run_dir <"$LAB/restore.json")/vm/charserial0.log
echo "running $(($(field command_to_running_ns <"$LAB/restore.json") / 1000000)) ms after the command"
# The same questions, of the console of this one.
(
	SERIAL=$log
	until_true 40 swept 0 "$((sweeps + 1))" || die "the guest does not carry on"
	healthy
) || exit 1
first=$(grep -Eo '^TICK [0-9]+' "$log" | head -n 1 | cut -d' ' -f2)
[ "$first" -le "$((tick + 1))" ] && [ "$first" -gt 1 ] || die "the clock went on at tick $first, and not at $tick"
[ "$(stat -c %U "/proc/$own")" = libvirt-qemu ] || die "the restored QEMU runs as $(stat -c %U "/proc/$own")"
kill -9 "$own"
gone() { ! [ -d "/proc/$own" ]; }
until_true 10 gone || die "pid $own does not end"

say "back to libvirt: export, virsh restore"
"$CKAGENT" export demo --store "$STORE" --format libvirt -o "$LAB/demo.save" || die "export"
from=$(mark)
virsh restore "$LAB/demo.save" >/dev/null || die "virsh restore"
is running || die "the domain is $(state)"
until_true 40 swept "$from" "$((sweeps + 1))" || die "the guest does not carry on"
first=$(serial "$from" | grep -Eo '^TICK [0-9]+' | head -n 1 | cut -d' ' -f2)
[ "$first" -le "$((tick + 1))" ] && [ "$first" -gt 1 ] || die "the clock went on at tick $first, and not at $tick"
healthy

say "and it can be protected again"
PID=$(cat /run/libvirt/qemu/demo.pid)
"$CKAGENT" checkpoint "$PID" --store "$STORE" >/dev/null || die "checkpoint after virsh restore"
until_true 10 is running || die "the domain is $(state)"
virsh destroy demo >/dev/null
say "done"

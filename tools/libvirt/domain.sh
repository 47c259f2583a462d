# Sourced by the stories: a domain with the self-checking guest, and what to ask it.
# Expects CKAGENT (the binary) and GUEST (a directory with vmlinux and initrd).

STORE=$LAB/store
SERIAL=$LAB/serial.log

die() {
	echo "FAILED: $*" >&2
	tail -n 5 "$SERIAL" "$LAB/libvirtd.log" /var/log/libvirt/qemu/demo.log >&2 2>/dev/null || true
	exit 1
}

say() { echo "== ${SECONDS}s $*"; }

# until SECONDS COMMAND...: waits until the command succeeds.
until_true() {
	local deadline=$(($(date +%s%N) + $1 * 1000000000))
	shift
	until "$@" >/dev/null 2>&1; do
		[ "$(date +%s%N)" -lt "$deadline" ] || return 1
		sleep 0.05
	done
}

# define_domain GUESTWORDS [DISKXML [VNCPASSWORD]]
define_domain() {
	cp "$GUEST/vmlinux" "$GUEST/initrd" "$LAB/" # libvirt gives them to QEMU's user
	cat >"$LAB/demo.xml" <<-END
		<domain type='qemu'>
		  <name>demo</name>
		  <uuid>6d1b2e58-6f0f-4a6c-9d38-0f7a2f1f6a10</uuid>
		  <memory unit='MiB'>256</memory>
		  <vcpu>1</vcpu>
		  <os>
		    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
		    <kernel>$LAB/vmlinux</kernel>
		    <initrd>$LAB/initrd</initrd>
		    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check cryptomgr.notests raid=noautodetect $1</cmdline>
		  </os>
		  <features><acpi/><apic/></features>
		  <on_poweroff>destroy</on_poweroff>
		  <on_crash>destroy</on_crash>
		  <devices>
		    <emulator>/usr/bin/qemu-system-x86_64</emulator>
		    ${2:-}
		    <interface type='user'><model type='virtio'/><rom enabled='no'/></interface>
		    <serial type='file'><source path='$SERIAL' append='on'/></serial>
		    <controller type='usb' model='none'/>
		    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
		    <memballoon model='virtio'/>
		    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
		    <graphics type='vnc' autoport='yes' listen='127.0.0.1' ${3:+passwd='$3'}/>
		    <video><model type='vga'/></video>
		  </devices>
		</domain>
	END
	virsh define "$LAB/demo.xml" >/dev/null
}

# serial [BYTE]: the console from a byte on.
serial() { tail -c "+$((${1:-0} + 1))" "$SERIAL"; }
mark() { stat -c %s "$SERIAL"; }

# said FROM EXPRESSION: whether a line of the console since then matches.
said() { serial "$1" | grep -Eq "$2"; }

start_domain() {
	local from=0
	[ ! -e "$SERIAL" ] || from=$(mark)
	virsh start demo >/dev/null || die "virsh start"
	until_true 120 said "$from" '^READY ' || die "the guest did not come up"
	PID=$(cat /run/libvirt/qemu/demo.pid)
}

state() { virsh domstate demo; }
is() { [ "$(state)" = "$1" ]; }

# last FROM WORD: the number behind WORD= in the last report that has it.
last() { serial "$1" | grep -Eo "\b$2=[0-9]+" | tail -n 1 | cut -d= -f2; }

# swept FROM N: the guest has verified its whole working set, N times in all.
swept() { local n; n=$(last "$1" sweeps); [ "${n:-0}" -ge "$2" ]; }

# Nothing the guest checks about its memory, its files or its clock is broken.
healthy() {
	! grep -a '^BAD ' "$SERIAL" || die "the guest found damage"
	! grep -aE '\bbad=[1-9]' "$SERIAL" || die "the guest counted damage"
}

# taken: how many checkpoints the store has.
taken() { { "$CKAGENT" ls --store "$STORE" --json 2>/dev/null || true; } | { grep -o '"id":' || true; } | wc -l; }

# field NAME: of the JSON object on standard input; numbers and plain strings only.
field() { grep -Eo "\"$1\":(\"[^\"]*\"|-?[0-9]+)" | head -n 1 | cut -d: -f2- | tr -d '"'; }

# untouched: nothing of ckagent's is in QEMU (bitmaps apart), and libvirt knows the
# domain as it did.
untouched() {
	local left
	left=$(virsh qemu-monitor-command demo '{"execute":"query-fdsets"}' | grep -o '"opaque":"ckagent"' || true)
	[ -z "$left" ] || die "a descriptor set was left"
	left=$(virsh qemu-monitor-command demo '{"execute":"query-jobs"}' | grep -o '"id":"ckagent[^"]*"' || true)
	[ -z "$left" ] || die "jobs were left: $left"
	left=$(virsh qemu-monitor-command demo '{"execute":"query-named-block-nodes","arguments":{"flat":true}}' |
		grep -o '"node-name":"ckagent[^"]*"' || true)
	[ -z "$left" ] || die "nodes were left: $left"
	# A discarded page's marker may keep bit 57, but no memory is registered.
	! grep '^VmFlags' "/proc/$PID/smaps" | grep -Eq ' u[mwi]( |$)' || die "memory stayed registered with a userfaultfd"
	! find "/proc/$PID/fd" -lname '*userfaultfd*' | grep -q . || die "a userfaultfd was left in QEMU"
}

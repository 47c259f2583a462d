package cmdline

import "strings"

// noValue lists the options that stand alone. The first group is the option
// table of QEMU 7.2 and 10.0 for x86 as compiled into the binaries, the second
// what older releases had and a long-lived VM may still carry.
var noValue = set(`
	S async-teardown audio-help daemonize enable-kvm enable-sync-profile
	full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet
	no-reboot no-shutdown no-user-config nodefaults nographic old-param
	only-migratable perfmap portrait preconfig s semihosting singlestep snapshot
	usb version win2k-hack xen-attach xen-domid-restrict

	alt-grab ctrl-grab curses enable-fips enable-hax localtime no-frame no-kvm
	no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection no-quit nodefconfig
	rtc-td-hack sdl show-cursor std-vga tdf xen-create`)

// withValue lists the options that take the next argument, whatever it looks like.
var withValue = set(`
	D L M accel acpitable action add-fd append audio audiodev bios blockdev boot
	cdrom chardev chroot compat cpu d debugcon device dfilter display drive dtb
	dump-vmstate echr fda fdb fsdev fw_cfg g gdb global hda hdb hdc hdd icount
	igvm incoming initrd iscsi k kernel loadvm m machine mem-path mon monitor msg
	mtdblock name net netdev nic numa object option-rom overcommit parallel pflash
	pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig rotate rtc
	run-with runas sandbox sd seed semihosting-config serial set shim smbios smp
	spice tpmdev trace usbdevice uuid vga virtfs vnc watchdog-action xen-domid

	balloon bootp bt channel clock hdachs kvm-shadow-memory realtime redir smb
	soundhw startdate tb-size tftp virtioconsole watchdog writeconfig`)

// implied is the key of a leading bare value, by option: "-device e1000" means
// "-device driver=e1000". Options absent here have no key=value form at all; an
// empty string means key=value without an implied key.
var implied = map[string]string{
	"accel": "accel", "action": "", "add-fd": "", "audio": "driver",
	"audiodev": "driver", "acpitable": "", "blockdev": "driver", "boot": "order",
	"chardev": "backend", "compat": "", "cpu": "model", "device": "driver",
	"display": "type", "drive": "", "fsdev": "fsdriver", "fw_cfg": "name",
	"global": "", "icount": "shift", "iscsi": "", "m": "size", "machine": "type",
	"M": "type", "mon": "chardev", "msg": "", "name": "guest", "net": "type",
	"netdev": "type", "nic": "type", "numa": "type", "object": "qom-type",
	"option-rom": "romfile", "overcommit": "", "plugin": "file", "realtime": "",
	"rtc": "", "run-with": "", "sandbox": "enable",
	"semihosting-config": "enable", "smbios": "", "smp": "cpus", "spice": "",
	"tpmdev": "type", "trace": "enable", "virtfs": "fsdriver", "vnc": "vnc",
}

func set(words string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(words) {
		m[w] = true
	}
	return m
}

// TakesValue reports whether the option of that name (without dashes) takes the
// next argument, and whether the name is known at all.
func TakesValue(name string) (takes, known bool) {
	if withValue[name] {
		return true, true
	}
	return false, noValue[name]
}

// Implied returns the key that a leading bare value of the option stands for
// ("driver" for device), and whether the option's value has key=value form at
// all. The key is empty where QEMU implies none (as for drive).
func Implied(option string) (key string, keyval bool) {
	key, keyval = implied[option]
	return key, keyval
}

package doctor

import (
	"fmt"
	"math/bits"
	"strings"

	"golang.org/x/sys/unix"
)

func judgeHost(f *Facts) []Check {
	var out []Check
	add := func(c Check) { c.Group = "host"; out = append(out, c) }

	k := &f.KVM
	c := Check{Name: "KVM", Status: OK, Detail: "runs 64-bit guests"}
	if k.Nested {
		c.Detail += "; nested (this host is a virtual machine)"
	}
	const tcg = "guests run by emulation (-accel tcg), slowly"
	switch {
	case k.OpenErr != nil:
		c.Status, c.Detail = Missing, reason(k.OpenErr)
		c.Costs = tcg + "; a checkpoint taken under KVM cannot be restored here"
		c.Mend = "load kvm_intel or kvm_amd, enable virtualization in the firmware, or be in the group that owns /dev/kvm"
	case k.CreateErr != nil:
		c.Status, c.Detail = Missing, "no virtual machine can be made: "+reason(k.CreateErr)
		c.Costs = tcg
		c.Mend = "enable virtualization in the firmware or, in a virtual machine, nested virtualization of its host"
	case k.RealErr != nil:
		c.Status, c.Detail = Missing, "does not even run 16-bit code: "+reason(k.RealErr)
		c.Costs, c.Mend = tcg, "nested virtualization of the host this machine runs on"
	case k.LongErr != nil:
		c.Status, c.Detail = Limited, "runs 16-bit code but no 64-bit guests: "+reason(k.LongErr)
		if k.Nested {
			c.Detail += "; nested (this host is a virtual machine)"
		}
		c.Costs = "64-bit " + tcg + "; only firmware and small 16/32-bit guests run under KVM"
		c.Mend = "full nested virtualization on the host this machine runs on, or bare metal"
	case !k.Hardware:
		// Nested hypervisors without it (kvm-pvm) run small guests, 64-bit code
		// included, but stop at what an unmodified kernel does while booting.
		c.Status, c.Detail = Limited, "runs code, but without hardware virtualization (the CPU shows neither vmx nor svm)"
		if k.Nested {
			c.Detail += "; nested (this host is a virtual machine)"
		}
		c.Costs = "unmodified 64-bit " + tcg + "; firmware and small guests run under KVM"
		c.Mend = "full nested virtualization on the host this machine runs on, or bare metal"
	}
	add(c)

	g := &f.Cgroup
	c = Check{Name: "control groups", Status: OK}
	var kinds []string
	usable := false
	if g.V2 != "" {
		s := "v2 at " + g.V2
		if g.V2Write == nil {
			usable = true
		} else {
			s += " (not writable: " + reason(g.V2Write) + ")"
		}
		kinds = append(kinds, s)
	}
	if len(g.V1) > 0 {
		s := "v1 " + strings.Join(g.V1, ",")
		if g.V1Write == nil {
			usable = true
		} else {
			s += " (not writable: " + reason(g.V1Write) + ")"
		}
		kinds = append(kinds, s)
	}
	c.Detail = strings.Join(kinds, "; ")
	if !usable {
		c.Status = Limited
		if c.Detail == "" {
			c.Status, c.Detail = Missing, "none mounted"
		}
		c.Costs = "guardian, pager and restored VMs share ckagent's group: stopping its service ends them too"
		c.Mend = "run as root with a writable cgroup hierarchy (systemd: Delegate=yes)"
	}
	add(c)

	c = Check{Name: "freezer", Status: OK}
	switch {
	case g.FreezerDir != "":
		c.Detail = "v1 at " + g.FreezerDir
	case g.V2Freeze:
		c.Detail = "v2 cgroup.freeze"
	default:
		c.Status, c.Detail = Missing, "neither v1 freezer nor v2 cgroup.freeze"
		c.Costs, c.Mend = "none for checkpoints; a frozen ckagent is still noticed by its heartbeat", "Linux 5.2 or later with cgroup v2, or the v1 freezer"
	}
	add(c)

	h := &f.HugePages
	c = Check{Name: "huge pages", Status: OK, Detail: fmt.Sprintf("transparent: %s; hugetlb pool: %d pages of 2 MiB, %d free", orNone(h.Transparent), h.HugetlbTotal, h.Free)}
	add(c)

	c = Check{Name: "same-page merging", Status: OK, Detail: "off"}
	switch f.KSM {
	case -1:
		c.Detail = "not in this kernel"
	case 1:
		c.Status, c.Detail = Limited, "on (/sys/kernel/mm/ksm/run is 1)"
		c.Costs = "merging takes the mark off armed pages: checkpoints in mode cow may have to be discarded and taken again"
		c.Mend = "echo 2 > /sys/kernel/mm/ksm/run, or start QEMU with -machine mem-merge=off"
	}
	add(c)
	return out
}

// capNames are the capabilities we ask for and what each is for.
var capNames = []struct {
	bit      int
	name     string
	required bool
	costs    string
}{
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", true, "only VMs of the same user can be attached to, and only if Yama allows"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", false, "VMs and files of other users are out of reach"},
	{unix.CAP_KILL, "CAP_KILL", false, "the guardian cannot signal VMs of other users"},
	{unix.CAP_SETUID, "CAP_SETUID", false, "a restored VM runs as the user of ckagent, not as the one it had"},
	{unix.CAP_IPC_LOCK, "CAP_IPC_LOCK", false, "the fault server is bound by the limit on locked memory"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", false, "no traffic signals"},
	{unix.CAP_BPF, "CAP_BPF", false, "no BPF programs, unless CAP_SYS_ADMIN is there"},
	{unix.CAP_PERFMON, "CAP_PERFMON", false, "no BPF tracing programs, unless CAP_SYS_ADMIN is there"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", false, "no groups in cgroup v1, no page frame numbers"},
}

func judgeRights(r *RightsFacts) []Check {
	var out []Check
	add := func(c Check) { c.Group = "rights"; out = append(out, c) }
	has := func(bit int) bool { return r.Caps>>bit&1 != 0 }

	c := Check{Name: "user", Status: OK, Detail: fmt.Sprintf("uid %d", r.EUID)}
	if r.EUID == 0 {
		c.Detail = "root"
	} else {
		c.Status = Limited
		c.Costs, c.Mend = "only VMs of this user can be protected", "run as root"
	}
	add(c)

	var present, absent, costs []string
	c = Check{Name: "capabilities", Status: OK, Required: true}
	for _, n := range capNames {
		if has(n.bit) {
			present = append(present, n.name)
			continue
		}
		absent = append(absent, n.name)
		costs = append(costs, n.name+": "+n.costs)
		if n.required {
			c.Status = Limited
		}
	}
	switch {
	case len(absent) == 0 && bits.OnesCount64(r.Caps) >= len(capNames):
		c.Detail = "all that are used: " + strings.Join(present, " ")
	default:
		c.Detail = "has " + orNone(strings.Join(present, " ")) + "; lacks " + strings.Join(absent, " ")
		c.Costs, c.Mend = strings.Join(costs, "; "), "run as root, or grant them to the service"
		c.Status = Limited
	}
	add(c)

	c = Check{Name: "ptrace", Status: OK, Required: true}
	switch {
	case r.PtraceScope < 0:
		c.Detail = "not restricted (no Yama)"
	case r.PtraceScope == 3:
		c.Status, c.Detail = Missing, "forbidden to everybody (kernel.yama.ptrace_scope=3)"
		c.Costs, c.Mend = "no running VM can be taken under protection", "kernel.yama.ptrace_scope=2 or less, and a reboot: 3 cannot be taken back"
	case r.PtraceScope > 0 && !has(unix.CAP_SYS_PTRACE):
		c.Status, c.Detail = Missing, fmt.Sprintf("kernel.yama.ptrace_scope=%d and no CAP_SYS_PTRACE", r.PtraceScope)
		c.Costs, c.Mend = "no running VM can be taken under protection", "run as root, or with CAP_SYS_PTRACE"
	default:
		c.Detail = fmt.Sprintf("allowed (kernel.yama.ptrace_scope=%d)", r.PtraceScope)
	}
	add(c)

	c = Check{Name: "locked memory", Status: OK, Required: true}
	switch {
	case has(unix.CAP_IPC_LOCK):
		c.Detail = "not limited (CAP_IPC_LOCK)"
	case r.MemlockBytes == ^uint64(0):
		c.Detail = "not limited"
	case r.MemlockBytes >= serverMemory:
		c.Detail = "limit " + size(r.MemlockBytes)
	default:
		c.Status, c.Detail = Limited, "limit "+size(r.MemlockBytes)
		c.Costs = "the fault server cannot lock its " + size(serverMemory) + ": under memory pressure a vCPU may wait for swap"
		c.Mend = "LimitMEMLOCK=infinity in the service, or ulimit -l unlimited"
	}
	add(c)
	return out
}

func judgeQEMU(f *Facts) []Check {
	var out []Check
	if len(f.QEMU) == 0 {
		out = append(out, Check{
			Group: "qemu", Name: "qemu-system-*", Status: Missing, Required: true, Detail: "none found",
			Costs: "checkpoints cannot be restored on this host",
			Mend:  "install it (Debian: apt install qemu-system-x86), or name the binary",
		})
	}
	for _, q := range f.QEMU {
		c := Check{Group: "qemu", Name: q.Path, Status: OK, Detail: q.Version, Required: false}
		major, minor, ok := versionOf(q.Version)
		switch {
		case q.Err != nil || !ok:
			c.Status, c.Detail = Missing, "does not say its version"
			if q.Err != nil {
				c.Detail += ": " + reason(q.Err)
			}
			c.Costs, c.Mend = "not used for restoring", "repair or remove it"
		case major < 7 || major == 7 && minor < 2:
			c.Status = Limited
			c.Costs, c.Mend = "older than what is tested (7.2 and 10.0): device state may not load", "QEMU 7.2 or later"
		}
		out = append(out, c)
	}
	for _, t := range f.Tools {
		c := Check{Group: "tools", Name: t.Name, Status: OK, Detail: t.Path}
		if t.Path == "" {
			c.Status, c.Detail = Missing, "not found"
			c.Costs, c.Mend = "no "+t.Use, "install it"
		}
		out = append(out, c)
	}
	return out
}

func judgeStore(s *StoreFacts) []Check {
	var out []Check
	add := func(c Check) { c.Group, c.Required = "store", true; out = append(out, c) }
	const noStore = "no checkpoint can be kept"

	c := Check{Name: "directory", Status: OK, Detail: s.Path}
	switch {
	case s.Hung:
		c.Status, c.Detail = Missing, s.Path+" does not answer"
		c.Costs, c.Mend = noStore, "repair the filesystem, or choose another with --store"
		add(c)
		return out
	case s.Exists && !s.IsDir:
		c.Status, c.Detail = Missing, s.Path+" is not a directory"
		c.Costs, c.Mend = noStore, "choose another with --store"
	case s.WriteErr != nil:
		c.Status, c.Detail = Missing, s.Path+": "+reason(s.WriteErr)
		c.Costs, c.Mend = noStore, "make it writable, or choose another with --store"
		if !s.Exists {
			c.Detail = s.Path + " does not exist and cannot be made: " + reason(s.WriteErr)
		}
	case !s.Exists:
		c.Detail = s.Path + " (will be made)"
	case s.Mode&0o077 != 0:
		c.Status, c.Detail = Limited, fmt.Sprintf("%s, mode %04o", s.Path, s.Mode)
		c.Costs, c.Mend = "others may look in; a RAM image holds the guest's secrets", "chmod 0700 "+s.Path
	}
	add(c)

	c = Check{Name: "filesystem", Status: OK, Detail: s.FSType}
	switch {
	case s.Volatile:
		c.Status, c.Costs, c.Mend = Limited, "checkpoints are gone after a reboot, and take RAM", "a disk filesystem"
	case s.Network:
		c.Status, c.Costs, c.Mend = Limited, "a server that hangs stalls the commit of checkpoints (never a VM)", "a local disk"
	}
	add(c)

	c = Check{Name: "space", Status: OK, Detail: size(s.FreeBytes) + " free of " + size(s.TotalBytes)}
	switch {
	case s.FreeBytes == 0:
		c.Status, c.Costs, c.Mend = Missing, noStore, "make room, or choose another with --store"
	case s.FreeBytes < scarceLow:
		c.Status, c.Costs, c.Mend = Limited, "room for few checkpoints: one takes up to the used RAM of its VM", "make room, or choose another with --store"
	}
	add(c)

	c = Check{Name: "fsync", Status: OK, Detail: fmt.Sprintf("median %v, worst %v", round(s.SyncMedian), round(s.SyncMax))}
	switch {
	case s.WriteErr != nil || s.Exists && !s.IsDir:
		c.Status, c.Detail = Missing, "not measured"
		c.Costs, c.Mend = "see directory", "see directory"
	case s.SyncMedian > slowSync:
		c.Status, c.Costs, c.Mend = Limited, "committing a checkpoint takes long (the pause does not)", "a faster disk"
	}
	if s.Probed != s.Path && s.Probed != "" && c.Status == OK {
		c.Detail += " (measured in " + s.Probed + ")"
	}
	add(c)
	return out
}

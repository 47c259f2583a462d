package restore

import (
	"slices"
	"strconv"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
)

// recorded is what a plan needs of a manifest.
func recorded(m *image.Manifest) plan.Recorded {
	r := plan.Recorded{
		VM: m.VM, ID: m.ID, Binary: m.QEMU.BinaryPath, Changes: m.Machine.Changes, Redacted: m.Machine.Redacted,
		UID: m.Machine.UID, GID: m.Machine.GID, Groups: m.Machine.Groups, Cwd: m.Machine.Cwd,
		Machine: m.Machine.Type, Accel: m.Machine.Accel, Paused: m.Machine.Facts[image.FactGuestRuns] == "false",
		Libvirt: m.Machine.Facts[image.FactManager] == managerLibvirt,
	}
	if len(m.Machine.Argv) > 0 {
		r.Argv = slices.Clone(m.Machine.Argv[1:])
	}
	for _, v := range m.Machine.Env {
		r.Env = append(r.Env, v.Name+"="+v.Value)
	}
	return r
}

// subject is the original, for the question whether it lives.
func subject(m *image.Manifest, p *plan.Plan) liveness.Subject {
	s := liveness.Subject{Name: p.OldName, UUID: p.OldUUID, Sockets: p.OldUnix, BootID: m.Machine.Facts[image.FactBootID]}
	s.PID, _ = strconv.Atoi(m.Machine.Facts[image.FactQEMUPID])
	s.StartTicks, _ = strconv.ParseUint(m.Machine.Facts[image.FactQEMUStart], 10, 64)
	for _, f := range p.OldFiles {
		if f.Writable {
			s.Images = append(s.Images, f.Path)
		}
	}
	return s
}

// hints turns the recorded layout into what makes resolving the new one quick.
func hints(m *image.Manifest) []vm.RAMBlock {
	out := make([]vm.RAMBlock, len(m.Blocks))
	for i, b := range m.Blocks {
		out[i] = vm.RAMBlock{Name: b.Name, UsedBytes: b.UsedBytes, TotalBytes: b.TotalBytes, GPA: b.GPA, Main: b.Main, ReadOnly: b.ReadOnly}
	}
	return out
}

package restore

import (
	"context"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
)

const (
	managerLibvirt = "libvirt"
	managerProxmox = "proxmox"
)

// managed is the doubt that whoever managed the VM runs it, or starts it again
// without being told.
func managed(ctx context.Context, m *image.Manifest, p *plan.Plan) (liveness.Doubt, bool) {
	name := manager(m, p)
	facts := m.Machine.Facts
	switch {
	case name == "":
		return liveness.Doubt{}, false
	case name == managerLibvirt && facts[image.FactLibvirtSocket] != "":
		return liveness.Libvirt(ctx, facts[image.FactLibvirtSocket], facts[image.FactLibvirtURI], m.Machine.UUID)
	}
	return liveness.Doubt{What: name + " manages it and may start it again by itself"}, true
}

// manager names what keeps the VM, as recorded or as its sockets say.
func manager(m *image.Manifest, p *plan.Plan) string {
	if name := m.Machine.Facts[image.FactManager]; name != "" {
		return name
	}
	for _, s := range p.OldUnix {
		switch {
		case strings.Contains(s, "/libvirt/"):
			return managerLibvirt
		case strings.Contains(s, "/qemu-server/"):
			return managerProxmox
		}
	}
	return ""
}

package agent

import (
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/vm"
)

// recordMachine puts what was learned of a machine into the form that images
// keep. The command line is the one that makes the machine as it is now.
func recordMachine(p *vm.Process, m vm.Machine) (image.Machine, image.QEMU) {
	out := image.Machine{
		Type: m.Type, Accel: m.Accel, CPUModel: cpuText(m.CPU), VCPUs: len(m.VCPUs), UUID: m.UUID, RTC: m.RTC,
		Argv: m.Current, UID: m.UID, GID: m.GID, Groups: m.Groups, Cwd: m.Cwd, Root: m.Root,
		Facts: map[string]string{
			image.FactQEMUPID:   strconv.Itoa(p.PID),
			image.FactQEMUStart: strconv.FormatUint(p.StartTicks, 10),
		},
	}
	out.Argv = slices.Clone(out.Argv)
	for _, s := range m.Secrets {
		out.Redacted = append(out.Redacted, s.Prompt)
		if s.Placeholder == "" {
			continue // given at run time, in no argument
		}
		for i := range out.Argv {
			out.Argv[i] = strings.ReplaceAll(out.Argv[i], s.Placeholder, image.RedactedMark)
		}
	}
	if boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		out.Facts[image.FactBootID] = strings.TrimSpace(string(boot))
	}
	for _, e := range m.Env {
		if name, value, ok := strings.Cut(e, "="); ok {
			out.Env = append(out.Env, image.EnvVar{Name: name, Value: value})
		}
	}
	if f := m.CPU.Features.String(); f != "" {
		out.Facts[image.FactCPU] = f
	}
	if m.Manager != "" {
		out.Facts[image.FactManager] = m.Manager
	}
	if d := m.Libvirt; d != nil {
		out.LibvirtXML = d.XML
		out.Facts[image.FactLibvirtURI], out.Facts[image.FactLibvirtSocket] = d.URI, d.Socket
		if d.Redacted {
			out.Facts[image.FactLibvirtSecrets] = "missing"
		}
	}
	return out, image.QEMU{Version: m.QEMUVersion, Package: m.QEMUPackage, BinaryPath: m.Binary}
}

// cpuText writes a resolved CPU model as the value of a -cpu option: the model
// and every feature, in a fixed order.
func cpuText(c vm.CPUModel) string {
	if c.Model == "" {
		return c.Argument
	}
	parts := []string{c.Model}
	names := make([]string, 0, len(c.Props))
	for name := range c.Props {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		value := ""
		switch v := c.Props[name].(type) {
		case bool:
			value = map[bool]string{true: "on", false: "off"}[v]
		case string:
			value = v
		default:
			b, err := json.Marshal(v)
			if err != nil {
				continue
			}
			value = string(b)
		}
		parts = append(parts, name+"="+value)
	}
	return strings.Join(parts, ",")
}

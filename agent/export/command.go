package export

import (
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// Command is the command line with which a stock QEMU loads a migration stream of
// this checkpoint: the recorded one with the machine type pinned to its version. An
// address such as "fd:0" or "exec:cat FILE" says where QEMU finds the stream.
func Command(m *image.Manifest, address string) ([]string, error) {
	refuse := func(err error) error {
		return problem.New(problem.Refused, "rebuild command line", m.ID, "%w", err)
	}
	if len(m.Machine.Argv) == 0 {
		return nil, problem.New(problem.Refused, "rebuild command line", m.ID, "none is recorded")
	}
	opts, err := cmdline.Parse(slices.Concat(m.Machine.Argv[1:], m.Machine.Changes))
	if err != nil {
		return nil, refuse(err)
	}
	typed := false
	out := opts[:0]
	for _, o := range opts {
		switch o.Name {
		case "incoming", "loadvm", "S":
			continue // how it came by its state then
		case "daemonize":
			if strings.HasPrefix(address, "fd:") {
				continue // it would take the descriptor for its own
			}
		case "machine", "M":
			kv, err := o.KeyVal()
			if err != nil {
				return nil, refuse(err)
			}
			if t, ok := kv.Get("type"); ok && t != "" {
				typed = true
				kv.Set("type", m.Machine.Type)
				o.Value = kv.String()
			}
		}
		out = append(out, o)
	}
	if !typed {
		out = slices.Insert(out, 0, cmdline.Option{Name: "machine", Value: m.Machine.Type, HasValue: true})
	}
	out = append(out, cmdline.Option{Name: "incoming", Value: address, HasValue: true})
	if m.Machine.Facts[image.FactGuestRuns] == "false" {
		out = append(out, cmdline.Option{Name: "S"})
	}
	return append([]string{m.QEMU.BinaryPath}, cmdline.Render(out)...), nil
}

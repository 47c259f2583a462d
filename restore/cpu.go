package restore

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// maxNamed is how many CPU features a message names.
const maxNamed = 12

// checkCPU compares the CPU of the QEMU that was started with the one the guest
// knows. The guest is not running yet.
func (x *run) checkCPU(ctx context.Context, c *qmp.Client) error {
	recorded := x.m.Machine.Facts[image.FactCPU]
	if recorded == "" {
		return nil // another architecture, or an older checkpoint
	}
	want, err := vm.ParseCPUFeatures(recorded)
	if err != nil {
		return problem.New(problem.Integrity, "restore", x.m.ID, "%w", err)
	}
	var cpus []struct {
		Path string `json:"qom-path"`
	}
	if err := c.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return err
	}
	if len(cpus) == 0 {
		return nil
	}
	have, err := vm.ReadCPUFeatures(ctx, c, cpus[0].Path)
	if err != nil {
		return err
	}
	lacks := want.Lacks(have)
	if names := x.absentFeatures(ctx, c, cpus[0].Path, len(lacks) > 0); len(names) > 0 {
		lacks = names
	}
	if want.Vendor != have.Vendor {
		lacks = append([]string{fmt.Sprintf("vendor %s (it is %s)", want.Vendor, have.Vendor)}, lacks...)
	}
	if len(lacks) > 0 {
		if n := len(lacks); n > maxNamed {
			lacks = append(lacks[:maxNamed], fmt.Sprintf("and %d more", n-maxNamed))
		}
		if !x.o.ForceCPU {
			return problem.New(problem.Refused, "restore", "CPU", "this host or accelerator lacks what the guest uses: %s", strings.Join(lacks, ", ")).
				WithHint("restore it on a host whose CPU has it; --force-cpu starts it all the same, and whatever uses such a feature crashes. For VMs that are to move, start them with a CPU model that all hosts have instead of -cpu host")
		}
		x.cpuNote = "the CPU lacks what the guest uses, as forced: " + strings.Join(lacks, ", ")
	} else if more := have.Lacks(want); len(more) > 0 {
		x.cpuNote = fmt.Sprintf("the CPU has %d features more than the guest knows of; it sees them at its next boot", len(more))
	}
	return nil
}

// absentFeatures names, of the features of the recorded model, those that the CPU
// does not have. Only asked when something is wrong: it is a question for each.
func (x *run) absentFeatures(ctx context.Context, c *qmp.Client, path string, wrong bool) []string {
	if !wrong {
		return nil
	}
	var out []string
	for _, word := range strings.Split(x.m.Machine.CPUModel, ",") {
		name, on := strings.CutSuffix(word, "=on")
		if !on || slices.Contains(out, name) {
			continue
		}
		var has bool
		if err := c.Execute(ctx, "qom-get", map[string]string{"path": path, "property": name}, &has); err == nil && !has {
			out = append(out, name)
		}
	}
	return out
}

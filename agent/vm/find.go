package vm

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// Running lists the pids of the QEMU processes of this host that we may look at.
func Running() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		exe, err := os.Readlink("/proc/" + n + "/exe")
		if err != nil || !AllowedBinary(strings.TrimSuffix(exe, " (deleted)")) {
			continue
		}
		out = append(out, pid)
	}
	slices.Sort(out)
	return out, nil
}

// GivenName is what -name says, "" without one.
func (p *Process) GivenName() string {
	if len(p.Argv) < 2 {
		return ""
	}
	opts, err := cmdline.Parse(p.Argv[1:])
	if err != nil {
		return ""
	}
	name := ""
	for _, o := range opts {
		if o.Name != "name" {
			continue
		}
		if kv, err := cmdline.ParseKeyVal(o.Value, "guest"); err == nil {
			if v, ok := kv.Get("guest"); ok {
				name = v
			}
		}
	}
	return name
}

package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseMount(t *testing.T) {
	for line, want := range map[string]Hierarchy{
		"cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0":              {Mount: "/sys/fs/cgroup/unified", Unified: true},
		"cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0": {Mount: "/sys/fs/cgroup/freezer", Freezer: true},
		"cgroup /c cgroup rw,cpu,cpuacct 0 0":                        {Mount: "/c", CPU: true},
	} {
		if got, ok := parseMount(line); !ok || got != want {
			t.Errorf("%q: %+v, %v", line, got, ok)
		}
	}
	for _, line := range []string{"", "cgroup", "tmpfs /sys/fs/cgroup tmpfs rw 0 0", "cgroup /d cgroup rw,devices 0 0"} {
		if got, ok := parseMount(line); ok {
			t.Errorf("%q is taken for %+v", line, got)
		}
	}
}

// A process is where it was moved to, and the group goes when the process has.
func TestMoveAndRemove(t *testing.T) {
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid := c.Process.Pid
	name := fmt.Sprintf("test-%d", pid)
	g := Move(pid, name)
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if kerr := c.Process.Kill(); kerr != nil {
		t.Fatal(kerr)
	}
	Sweep() // it has not been reaped: the group is in use
	_ = c.Wait()
	Sweep()
	if err != nil {
		t.Fatal(err)
	}
	if !g.Apart() {
		if len(Hierarchies()) > 0 && os.Getuid() == 0 {
			t.Fatal("root could not move a process into any Hierarchy")
		}
		return
	}
	if n := strings.Count(string(groups), "/"+Parent+"/"+name); n != len(g.dirs) {
		t.Errorf("in %d groups, want %d:\n%s", n, len(g.dirs), groups)
	}
	for _, dir := range g.dirs {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is left", dir)
		}
	}
}

// What freezes or starves a process that was killed is left behind; other groups stay.
func TestFree(t *testing.T) {
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait(); Sweep() }()
	pid := c.Process.Pid
	var in []string
	for _, h := range Hierarchies() {
		dir := filepath.Join(h.Mount, Parent, fmt.Sprintf("test-free-%d", pid))
		if (h.CPU || h.Freezer || h.Unified) && makeAndPut(pid, dir) {
			in = append(in, dir)
		}
	}
	if len(in) == 0 && len(Hierarchies()) > 0 && os.Getuid() == 0 {
		t.Fatal("root could not move a process into any hierarchy")
	}
	Roots().Free(pid)
	for _, dir := range in {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			t.Error(err)
		}
		if strings.Contains(string(b), fmt.Sprint(pid)) {
			t.Errorf("it is still in %s", dir)
		}
	}
}

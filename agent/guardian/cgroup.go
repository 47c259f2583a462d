package guardian

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// cgroupParent is the cgroup, in each hierarchy, below which guardians live.
const cgroupParent = "ckagent"

// cgroups are the directories that belong to one guardian: one in each hierarchy
// by which the agent could be frozen, starved or ended (the unified one; of the
// old ones freezer, cpu, memory, pids and the service manager's). Best effort:
// without the right to make them the guardian shares the agent's fate in that
// respect, which its session and pidfds do not depend on.
type cgroups struct {
	dirs    []string
	freezer string // the v1 freezer's, "" if there is none
}

func (c cgroups) String() string { return strings.Join(c.dirs, " ") }

func guardianCgroup(qemu identity) string {
	return fmt.Sprintf("guardian-%d-%d", qemu.PID, qemu.StartTicks)
}

type hierarchy struct {
	mount   string
	freezer bool
}

// hierarchies lists the mounts concerned.
func hierarchies() (out []hierarchy) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		w := strings.Fields(sc.Text())
		if len(w) < 4 {
			continue
		}
		switch w[2] {
		case "cgroup2":
			out = append(out, hierarchy{mount: w[1]})
		case "cgroup":
			for opt := range strings.SplitSeq(w[3], ",") {
				switch opt {
				case "freezer", "cpu", "memory", "pids", "name=systemd":
					out = append(out, hierarchy{w[1], opt == "freezer"})
				}
			}
		}
	}
	return out
}

// joinCgroups moves the calling process into cgroups of the given name.
func joinCgroups(name string) (c cgroups) {
	self := []byte(strconv.Itoa(os.Getpid()))
	for _, h := range hierarchies() {
		removeEmpty(h)
		dir := filepath.Join(h.mount, cgroupParent, name)
		if !enter(dir, self) && !enter(dir, self) { // another guardian's removeEmpty may come between
			_ = os.Remove(dir)
			continue
		}
		c.dirs = append(c.dirs, dir)
		if h.freezer {
			c.freezer = dir
		}
	}
	return c
}

func enter(dir string, self []byte) bool {
	return os.MkdirAll(dir, 0o755) == nil && os.WriteFile(filepath.Join(dir, "cgroup.procs"), self, 0) == nil
}

// removeEmpty removes the cgroups of guardians that were killed, or that had
// adopted a process which did not die in time. Those in use cannot be removed.
func removeEmpty(h hierarchy) {
	old, _ := filepath.Glob(filepath.Join(h.mount, cgroupParent, "guardian-*"))
	for _, dir := range old {
		_ = os.Remove(dir)
	}
}

// adopt moves a process into our v1 freezer cgroup, which is never frozen.
func (c cgroups) adopt(pid int) {
	if c.freezer != "" {
		_ = os.WriteFile(filepath.Join(c.freezer, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
	}
}

// leave steps out to the parents, since a cgroup with a process in it cannot be
// removed, and removes them.
func (c cgroups) leave() {
	self := []byte(strconv.Itoa(os.Getpid()))
	for _, dir := range c.dirs {
		_ = os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.procs"), self, 0)
		_ = os.Remove(dir)
	}
}

// removeCgroups removes the empty cgroups of a guardian that could not do so.
func removeCgroups(name string) {
	for _, h := range hierarchies() {
		_ = os.Remove(filepath.Join(h.mount, cgroupParent, name))
	}
}

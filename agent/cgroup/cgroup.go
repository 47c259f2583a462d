package cgroup

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Parent is the group, in each hierarchy, below which ours are.
const Parent = "ckagent"

// Group is a set of directories, one in each hierarchy. The zero value is a
// group in no hierarchy, on which everything does nothing.
type Group struct {
	dirs []string
	// free are the directories, one in each hierarchy that can freeze a process or
	// leave it without processor, where nothing does: see Free.
	free []string
}

func (g Group) String() string { return strings.Join(g.dirs, " ") }

// Apart reports whether any hierarchy took the process.
func (g Group) Apart() bool { return len(g.dirs) > 0 }

// Hierarchy is where one kind of control groups is mounted.
type Hierarchy struct {
	Mount   string
	Freezer bool // the old freezer
	CPU     bool // the old cpu controller
	Unified bool // all controllers that the old ones have left over
}

// Hierarchies lists the mounts concerned.
func Hierarchies() (out []Hierarchy) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if h, ok := parseMount(sc.Text()); ok {
			out = append(out, h)
		}
	}
	return out
}

func parseMount(line string) (Hierarchy, bool) {
	w := strings.Fields(line)
	if len(w) < 4 {
		return Hierarchy{}, false
	}
	switch w[2] {
	case "cgroup2":
		return Hierarchy{Mount: w[1], Unified: true}, true
	case "cgroup":
		for opt := range strings.SplitSeq(w[3], ",") {
			switch opt {
			case "freezer", "cpu", "name=systemd":
				return Hierarchy{Mount: w[1], Freezer: opt == "freezer", CPU: opt == "cpu"}, true
			}
		}
	}
	return Hierarchy{}, false
}

// Join moves the calling process into groups of this name.
func Join(name string) Group { return Move(os.Getpid(), name) }

// Move moves a process into groups of this name.
func Move(pid int, name string) (g Group) {
	for _, h := range Hierarchies() {
		if h.CPU {
			// The root group has no quota, and unlike a new group a share of
			// real-time, which threads that serve faults ask for.
			put(pid, h.Mount)
			g.free = append(g.free, h.Mount)
			continue
		}
		dir := filepath.Join(h.Mount, Parent, name)
		if !makeAndPut(pid, dir) {
			_ = os.Remove(dir)
			continue
		}
		g.dirs = append(g.dirs, dir)
		if h.Freezer || h.Unified {
			g.free = append(g.free, dir)
		}
	}
	return g
}

// makeAndPut tries again if a Sweep took the empty group away in between.
func makeAndPut(pid int, dir string) bool {
	for range 3 {
		if os.MkdirAll(dir, 0o755) == nil && put(pid, dir) {
			return true
		}
	}
	return false
}

func put(pid int, dir string) bool {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) == nil
}

// Free moves a process that was killed out of what keeps it from dying: an old
// freezer, or a limit that leaves it no processor to end on. A process with one percent
// of a processor takes seconds to give back its memory.
func (g Group) Free(pid int) {
	for _, dir := range g.free {
		put(pid, dir)
	}
}

// Roots is the group without freezer and limits, for Free only.
func Roots() (g Group) {
	for _, h := range Hierarchies() {
		if h.Freezer || h.CPU || h.Unified {
			g.free = append(g.free, h.Mount)
		}
	}
	return g
}

// Dirs are the directories that groups of this name have, or would have.
func Dirs(name string) (dirs []string) {
	for _, h := range Hierarchies() {
		dirs = append(dirs, filepath.Join(h.Mount, Parent, name))
	}
	return dirs
}

// Leave takes the calling process out, to the parents, and removes the group: one
// with a process in it cannot be removed.
func (g Group) Leave() {
	for _, dir := range g.dirs {
		put(os.Getpid(), filepath.Dir(dir))
		_ = os.Remove(dir)
	}
}

// Remove removes the groups of this name that are empty: those of a process that
// has ended.
func Remove(name string) {
	for _, dir := range Dirs(name) {
		_ = os.Remove(dir)
	}
}

// Sweep removes all our groups that are empty: those of processes that were
// killed. Groups that somebody is in cannot be removed and stay.
func Sweep() {
	for _, h := range Hierarchies() {
		entries, err := os.ReadDir(filepath.Join(h.Mount, Parent))
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() {
				_ = os.Remove(filepath.Join(h.Mount, Parent, e.Name()))
			}
		}
	}
}

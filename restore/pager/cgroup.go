package pager

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A service manager ends what is left in a unit's cgroup, and an administrator
// freezes cgroups. Each of the two processes therefore moves to one of its own, in
// every hierarchy that is about the life of processes: the unified one, and of the
// old ones the freezer and systemd's. All of it is best effort: without the right
// to do so the pager still works, only less apart.

const cgroupParent = "ckagent"

// hierarchies lists the mount points concerned.
func hierarchies() (dirs []string) {
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
		switch opts := "," + w[3] + ","; {
		case w[2] == "cgroup2",
			w[2] == "cgroup" && (strings.Contains(opts, ",freezer,") || strings.Contains(opts, ",name=systemd,")):
			dirs = append(dirs, w[1])
		}
	}
	return dirs
}

// joinCgroup moves this process into cgroups named name; leave undoes it.
func joinCgroup(name string) (leave func()) {
	var joined []string
	self := []byte(strconv.Itoa(os.Getpid()))
	for _, h := range hierarchies() {
		dir := filepath.Join(h, cgroupParent, name)
		if os.MkdirAll(dir, 0o755) != nil {
			continue
		}
		if os.WriteFile(filepath.Join(dir, "cgroup.procs"), self, 0) != nil {
			_ = os.Remove(dir)
			continue
		}
		joined = append(joined, dir)
	}
	return func() {
		for _, dir := range joined {
			// A cgroup with a process in it cannot be removed: step out first.
			_ = os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.procs"), self, 0)
			_ = os.Remove(dir)
		}
	}
}

// dropCgroup removes what a dead process left.
func dropCgroup(name string) {
	for _, h := range hierarchies() {
		_ = os.Remove(filepath.Join(h, cgroupParent, name))
	}
}

// sweepCgroups removes what processes left that were not quite dead yet when their
// cgroup was dropped. One that is in use cannot be removed anyway.
func sweepCgroups() {
	for _, h := range hierarchies() {
		for _, r := range []role{workerRole, supervisorRole} {
			dirs, _ := filepath.Glob(filepath.Join(h, cgroupParent, r.name+"-*"))
			for _, dir := range dirs {
				pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), r.name+"-"))
				if err != nil {
					continue
				}
				if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); os.IsNotExist(err) {
					_ = os.Remove(dir)
				}
			}
		}
	}
}

func cgroupName(role string, pid int) string { return role + "-" + strconv.Itoa(pid) }

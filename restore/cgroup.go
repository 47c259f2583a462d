package restore

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// isolate moves a process into a cgroup of its own in every hierarchy that decides
// about the life of processes, so that stopping or freezing the service or session
// that asked for the restore does not stop the VM. Best effort: it reports whether
// any hierarchy took it.
func isolate(pid int, name string) bool {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return false
	}
	defer f.Close()
	moved := false
	for sc := bufio.NewScanner(f); sc.Scan(); {
		w := strings.Fields(sc.Text())
		if len(w) < 4 {
			continue
		}
		opts := "," + w[3] + ","
		if w[2] != "cgroup2" && (w[2] != "cgroup" || !strings.Contains(opts, ",freezer,") && !strings.Contains(opts, ",name=systemd,")) {
			continue
		}
		dir := filepath.Join(w[1], "ckagent", name)
		if os.MkdirAll(dir, 0o755) != nil {
			continue
		}
		if os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) != nil {
			_ = os.Remove(dir)
			continue
		}
		moved = true
	}
	return moved
}

// dropCgroups removes the cgroups of a process that is gone.
func dropCgroups(name string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/ckagent/" + name)
	for _, d := range append(dirs, "/sys/fs/cgroup/ckagent/"+name) {
		_ = os.Remove(d)
	}
}

func cgroupName(pid int) string { return "restored-" + strconv.Itoa(pid) }

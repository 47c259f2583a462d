package restore

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
)

// stateName is the file in a run directory that says whose it is.
const stateName = "state.json"

// state is what a run directory says about itself.
type state struct {
	Checkpoint string   `json:"checkpoint"`
	VM         string   `json:"vm"`
	Name       string   `json:"name"`
	BootID     string   `json:"boot_id"`
	Restorer   identity `json:"restorer"`
	QEMU       identity `json:"qemu"` // zero while it is being started
	Guest      stage    `json:"guest,omitempty"`
	// Disks are the files made for the guest, DiskDir the directory that was made for
	// them. Once the guest may have run they are its own, and nobody removes them.
	Disks   []string `json:"disks,omitempty"`
	DiskDir string   `json:"disk_dir,omitempty"`
	// Rehearsal: nobody misses the VM, nor its disks.
	Rehearsal bool `json:"rehearsal,omitempty"`
}

// removeDisks takes away what was made for a guest that certainly never ran.
func (s *state) removeDisks() {
	for _, path := range s.Disks {
		_ = os.Remove(path) // it may never have been made
	}
	if s.DiskDir != "" {
		_ = os.Remove(s.DiskDir)
		_ = os.Remove(filepath.Dir(s.DiskDir)) // of the VM; stays while there are others
	}
}

// identity is a process that cannot be mistaken for its successor.
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks since boot
}

func (id identity) alive() bool {
	if id.PID <= 0 {
		return false
	}
	start, err := startTicks(id.PID)
	if err != nil { // what cannot be read, for want of a descriptor for one, may be there
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH)
	}
	return id.Start == 0 || start == id.Start
}

// endPatience is for a killed QEMU to be gone.
const endPatience = 2 * time.Second

// end kills this very process and waits for it, but not for ever.
func (id identity) end() {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if !id.alive() { // held by now: what is true stays true
		return
	}
	if unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) != nil {
		return
	}
	for deadline := time.Now().Add(endPatience); ; {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, max(0, int(left/time.Millisecond)))
		if n > 0 || left <= 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// startTicks is when a process started; one that only waits to be reaped counts as gone.
func startTicks(pid int) (uint64, error) {
	s, err := procstat.Read(pid)
	if err == nil && s.Ended() {
		err = unix.ESRCH
	}
	return s.StartTicks, err
}

// runDir is the private directory of one restored VM.
type runDir struct {
	path  string
	state state
}

// runDirName is the directory a restore by this process would use.
func runDirName(root, name string) string {
	return filepath.Join(root, cleanName(name)+"-"+strconv.Itoa(os.Getpid()))
}

// maxRunName is how much of a VM's name its run directory has: a socket's path has 107
// bytes, and those in there have names as well. The state says the name whole.
const maxRunName = 40

// cleanName makes a VM's name, or the beginning of it, a directory's: for people, since
// several VMs may come to the same.
func cleanName(name string) string {
	clean := strings.Map(func(r rune) rune {
		if r == '/' || r == ',' || r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, name)
	clean = clean[:min(len(clean), maxRunName)]
	if clean == "." || clean == ".." || clean == "" {
		clean = "_" + clean
	}
	return clean
}

// reserveRunDir makes the directory before its plan is known.
func reserveRunDir(root, name string) (*runDir, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, problem.New(problem.Failed, "make run directory", root, "%w", err)
	}
	first := runDirName(root, name)
	for range maxNames {
		path := first
		// A pager that is just ending removes its empty directory: names are not used
		// twice by one process.
		if n := dirCount.Add(1); n > 1 {
			path += "." + strconv.FormatUint(n, 10)
		}
		err := os.Mkdir(path, 0o700)
		if err == nil {
			d := &runDir{path: path}
			if err := os.Mkdir(d.vmDir(), 0o700); err != nil {
				return nil, problem.New(problem.Failed, "make run directory", d.vmDir(), "%w", errors.Join(err, d.remove()))
			}
			return d, nil
		}
		// In a container our pid may be the same every time: an earlier restore of
		// this VM has the name, and its guest may run.
		if !errors.Is(err, os.ErrExist) {
			return nil, problem.New(problem.Failed, "make run directory", path, "%w", err)
		}
	}
	return nil, problem.New(problem.Failed, "make run directory", first, "%d names are taken", maxNames).
		WithHint("ls -d %s.*: each has a %s that says whose it is; remove those of VMs that are gone", first, stateName)
}

// maxNames is how many names are tried for a run directory.
const maxNames = 1000

// dirCount counts the directories this process made.
var dirCount atomic.Uint64

// save writes the state; rename makes it whole for whoever reads it.
func (d *runDir) save() error {
	b, err := json.MarshalIndent(&d.state, "", " ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(d.path, "."+stateName)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return problem.New(problem.Failed, "write", tmp, "%w", err)
	}
	if err := os.Rename(tmp, filepath.Join(d.path, stateName)); err != nil {
		return problem.New(problem.Failed, "write", tmp, "%w", err)
	}
	return nil
}

func (d *runDir) remove() error { return os.RemoveAll(d.path) }

// vmDir is the part that is QEMU's own.
func (d *runDir) vmDir() string { return filepath.Join(d.path, plan.VMDir) }

// own gives QEMU's part of the directory to the user it runs as. The rest stays ours:
// we, and the pager, act on what is written there with rights that this user lacks.
func (d *runDir) own(uid, gid int) error {
	if uid == os.Geteuid() {
		return nil
	}
	// What holds that part may be passed through but not listed from now on.
	root := filepath.Dir(d.path)
	for _, dir := range []string{d.path, root, filepath.Dir(root)} {
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if dir == filepath.Dir(root) && filepath.Clean(root) != RunRoot {
			break // a root of somebody's choice lies in directories of theirs
		}
		if st.Mode()&0o001 == 0 {
			if err := os.Chmod(dir, st.Mode().Perm()|0o011); err != nil {
				return err
			}
		}
	}
	return os.Chown(d.vmDir(), uid, gid)
}

// Sweep removes the run directories of VMs that are gone, and returns how many. A
// QEMU whose guest never ran, because its restorer was killed, is ended first: it
// would stand in the way of every further restore of that VM.
// Directories of another boot cannot exist (tmpfs) unless root lies elsewhere.
func Sweep(root string) (int, error) {
	if root == "" {
		root = RunRoot
	}
	entries, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	boot, err := liveness.BootID()
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		raw, err := os.ReadFile(filepath.Join(dir, stateName))
		if err != nil || !e.IsDir() {
			continue // not ours, or of a restore that has only begun
		}
		var s state
		if json.Unmarshal(raw, &s) != nil {
			continue
		}
		if s.BootID == boot {
			if s.QEMU.PID == 0 && !s.Restorer.alive() {
				// Killed between starting a QEMU and writing down which.
				if s.QEMU = startedFor(dir); s.QEMU.PID != 0 {
					s.Guest = stageHeld
				}
			}
			if s.QEMU.alive() && !s.Restorer.alive() && (s.Guest == stageHeld || s.Guest == stageTold && neverRan(s.QEMU.PID)) {
				s.QEMU.end()
				s.Guest = stageHeld // for certain, as it stays ended
			}
			if s.Rehearsal && s.QEMU.alive() && !s.Restorer.alive() {
				s.QEMU.end()
			}
			if s.QEMU.alive() || s.Restorer.alive() && s.QEMU.PID == 0 {
				continue
			}
		}
		cgroup.Remove(groupName(s.QEMU.PID)) // fails while a process is in it
		if s.Guest == "" || s.Guest == stageHeld || s.Rehearsal {
			s.removeDisks()
		}
		if err := os.RemoveAll(dir); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// startedFor finds the process that was started for a run directory: its messages go to
// the log in there. Zero if there is none.
func startedFor(dir string) identity {
	log, err := os.Stat(filepath.Join(dir, logName))
	if err != nil {
		return identity{}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return identity{}
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		start, err := startTicks(pid)
		if err != nil {
			continue
		}
		if out, err := os.Stat("/proc/" + e.Name() + "/fd/1"); err == nil && os.SameFile(out, log) {
			return identity{pid, start}
		}
	}
	return identity{}
}

// adopt notes whose directory it is.
func (d *runDir) adopt(id identity) error {
	d.state.QEMU, d.state.Guest = id, stageHeld
	return d.save()
}

// reached notes what becomes of the guest.
func (d *runDir) reached(s stage) error {
	d.state.Guest = s
	return d.save()
}

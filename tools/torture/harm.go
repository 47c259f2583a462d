package torture

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Victim is who is harmed.
type Victim string

const (
	Agent      Victim = "agent"
	Server     Victim = "fault server"
	Guardian   Victim = "guardian"
	Service    Victim = "agent+fault server" // what shares a service's cgroup
	Both       Victim = "agent+guardian"     // then `ckagent release`
	QEMU       Victim = "qemu"
	Restorer   Victim = "restorer"
	Pager      Victim = "pager"
	Supervisor Victim = "supervisor"
	Pagers     Victim = "pager+supervisor"
	Nobody     Victim = "nobody" // an unharmed run, for comparison
)

// Action is what is done.
type Action string

const (
	Kill   Action = "SIGKILL"
	Stop   Action = "SIGSTOP"
	Freeze Action = "freezer"
	Starve Action = "cpu 1 %"
	None   Action = "nothing"
)

// cage are the cgroups that a victim is put into to be frozen or starved.
type cage struct{ freezer, cpu string }

const freezerMount, cpuMount = "/sys/fs/cgroup/freezer", "/sys/fs/cgroup/cpu"

// newCage makes them; where a hierarchy is not there its path is empty.
func newCage(name string) *cage {
	c := &cage{}
	for mount, dir := range map[string]*string{freezerMount: &c.freezer, cpuMount: &c.cpu} {
		path := filepath.Join(mount, name)
		if err := os.Mkdir(path, 0o755); err == nil || errors.Is(err, os.ErrExist) {
			*dir = path
		}
	}
	return c
}

func (c *cage) supports(a Action) bool {
	return a != Freeze && a != Starve || a == Freeze && c.freezer != "" || a == Starve && c.cpu != ""
}

// open lets everybody go on, and moves them out.
func (c *cage) open() {
	if c.freezer != "" {
		_ = within(filepath.Join(c.freezer, "freezer.state"), "THAWED")
	}
	if c.cpu != "" {
		_ = within(filepath.Join(c.cpu, "cpu.cfs_quota_us"), "-1")
	}
}

func (c *cage) remove() {
	c.open()
	for _, dir := range []string{c.freezer, c.cpu} {
		if dir != "" {
			_ = os.Remove(dir) // busy if a process of ours is left, which is reported elsewhere
		}
	}
}

// starve moves a process's threads into the starved group, all but those that the
// kernel keeps out of groups without a share of real-time.
func (c *cage) starve(pid int) error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if errors.Is(err, os.ErrNotExist) { // it ended by itself, as a signal would have told
		return fmt.Errorf("pid %d: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range threads {
		err := within(filepath.Join(c.cpu, "tasks"), t.Name())
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// harm does the action to processes. The returned undo is for those that live.
func (c *cage) harm(a Action, victims []*Proc) (undo func(), err error) {
	undo = func() {}
	switch a {
	case Kill, Stop:
		sig := unix.SIGKILL
		if a == Stop {
			sig = unix.SIGSTOP
			undo = func() {
				for _, p := range victims {
					_ = p.signal(unix.SIGCONT) // may be gone by now
				}
			}
		}
		for _, p := range victims {
			err = errors.Join(err, p.signal(sig))
		}
		return undo, err
	case Freeze:
		for _, p := range victims {
			err = errors.Join(err, within(filepath.Join(c.freezer, "cgroup.procs"), strconv.Itoa(p.PID)))
		}
		return c.open, errors.Join(err, within(filepath.Join(c.freezer, "freezer.state"), "FROZEN"))
	case Starve:
		// 1 ms in 100 ms.
		err = errors.Join(within(filepath.Join(c.cpu, "cpu.cfs_period_us"), "100000"), within(filepath.Join(c.cpu, "cpu.cfs_quota_us"), "1000"))
		for _, p := range victims {
			err = errors.Join(err, c.starve(p.PID))
		}
		return c.open, err
	case None:
		return undo, nil
	}
	return undo, fmt.Errorf("action %q is not known", a)
}

package pager

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Resume picks up the pager of a run directory: by hand, if both of its processes
// died at once, or for the agent to follow one that it did not start. If either is
// alive it is joined, and both are replaced if they stand still; otherwise new ones
// are started. Pages that could not be had are tried again.
func Resume(ctx context.Context, runDir string) (*Process, error) {
	runDir, err := filepath.Abs(runDir)
	if err != nil {
		return nil, err
	}
	st, err := loadState(runDir)
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(runDir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, problem.New(problem.Failed, "resume pager", runDir, "%w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, problem.New(problem.Busy, "resume pager", runDir, "somebody else is at it: %w", err)
	}
	var phase Phase
	for i, name := range phaseNames {
		if name == st.Phase {
			phase = Phase(i)
		}
	}
	switch {
	case phase == PhaseFailed && st.Error != nil:
		return nil, st.Error.Err()
	case phase.over():
		return nil, problem.New(problem.NotFound, "resume pager", runDir, "its work is over (%s)", phase)
	}
	if ctl := joinLiving(runDir); ctl != nil {
		p := newProcess(runDir, st.Config.Self, ctl, nil)
		p.Retry()
		return p, nil
	}
	pidfd, err := openTarget(&st.Config)
	if err != nil {
		return nil, problem.New(problem.NotFound, "resume pager", fmt.Sprintf("pid %d", st.Config.QEMUPID), "%w", err)
	}
	unix.Close(pidfd)
	ctl, err := newControl()
	if err != nil {
		return nil, problem.New(problem.Failed, "resume pager", runDir, "%w", err)
	}
	ctl.startNS.Store(nowNS())
	ctl.phase.Store(uint32(phase))
	var children []*os.Process
	for _, r := range []role{workerRole, supervisorRole} {
		c, err := spawn(r, occupant{}, st.Config.Self, runDir, ctl, nil, "")
		if err != nil {
			for _, c := range children {
				_ = c.Kill()
				_, _ = c.Wait()
			}
			ctl.close()
			return nil, problem.New(problem.Failed, "resume pager", runDir, "%w", err)
		}
		children = append(children, c)
	}
	if err := noteSeats(runDir, ctl); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return newProcess(runDir, st.Config.Self, ctl, children), nil
}

// joinLiving finds the control memory through whoever is still there.
func joinLiving(runDir string) *control {
	var s seats
	if readFile(runDir, seatsFile, &s) != nil {
		return nil
	}
	for _, o := range []occupant{s.Supervisor, s.Worker} {
		if !present(o) {
			continue
		}
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", o.PID, controlFD), os.O_RDWR, 0)
		if err != nil {
			continue
		}
		ctl, err := openControl(f)
		if err != nil {
			f.Close()
			continue
		}
		if present(ctl.supervisor.occupant()) || present(ctl.worker.occupant()) {
			return ctl
		}
		ctl.close()
	}
	return nil
}

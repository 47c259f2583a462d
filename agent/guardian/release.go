package guardian

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

// Release does by hand what a guardian does: it ends what guardian and fault
// server of ours still work on the QEMU process, closes what an interrupted
// injection left inside, lets QEMU go on if the control page says that we stopped
// it, and reports what it did. With nothing to do it does nothing and says so:
// it may be repeated.
//
// problem.Busy if a live agent is at work on the VM; problem.NotFound if there is
// no such process. Without a state file, userfaultfds inside a process that has
// memory registered with one (a lazy restore, post-copy, QEMU's own background
// snapshot) are left alone: to close them would feed the guest zeros, or tear it.
// What an interrupted injection left has nothing registered.
func Release(ctx context.Context, pid int) (Report, error) { return releaseIn(ctx, stateDir, pid) }

// Recover releases a VM whose agent and guardian died together, so that another agent
// may begin: it would take the VM for one that somebody else had paused, and its
// guardian would write over what is known of it. The caller holds the VM's lock: no
// agent is at it. With nothing left of them it does nothing, and touches nothing.
// problem.Busy while a guardian whose agent gave up still tries to resume the VM.
func Recover(ctx context.Context, qemu *vm.Process) (Report, error) {
	s, err := readState(stateDir, identity{qemu.PID, qemu.StartTicks})
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission): // the latter Start says, if it is to be used
		return Report{}, nil
	case err == nil && s.Guardian.working():
		return Report{}, problem.New(problem.Busy, "attach", qemu.String(), "an earlier checkpoint had stopped it, and its guardian with pid %d still tries to resume it", s.Guardian.PID).
			WithHint("QEMU does not answer: see what it waits for; ckagent release %d", qemu.PID)
	}
	r, err := Release(ctx, qemu.PID)
	if err != nil {
		return r, problem.New(problem.CodeOf(err), "attach", qemu.String(), "what an earlier ckagent left cannot be put right: %w", err).
			WithHint("ckagent release %d", qemu.PID)
	}
	if r.Resumed || r.Continued {
		fmt.Fprintf(os.Stderr, "ckagent: pid %d: an earlier ckagent and its guardian died while the VM was stopped; it was let run again\n", qemu.PID)
	}
	return r, nil
}

func releaseIn(ctx context.Context, dir string, pid int) (Report, error) {
	began := time.Now()
	r := Report{Schema: reportSchema, QEMUPID: pid, Reason: "asked to", At: began.Format(stateTimestamp), ClosedFDs: []int{}}
	object := fmt.Sprintf("pid %d", pid)
	qemu, err := identify(pid)
	if err != nil {
		return r, problem.New(problem.NotFound, "release", object, "no such process: %w", err)
	}
	pidfd, err := qemu.open()
	if err != nil {
		return r, problem.New(problem.NotFound, "release", object, "it ended: %w", err)
	}
	defer pidfd.Close()
	s, err := readState(dir, qemu)
	known := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, problem.New(problem.Failed, "release", object, "state file: %w", err).
			WithHint("remove %s%s if it is damaged, and try again", statePath(dir, qemu), stateSuffix)
	}
	control, err := openNamedControl(dir, qemu)
	if err == nil {
		defer control.Close()
		r.Phase = control.Phase.Load()
	} else if !errors.Is(err, fs.ErrNotExist) {
		r.note(err)
	}
	if known {
		if err := endProcesses(s, control, &r); err != nil {
			return r, err
		}
	}
	if control != nil {
		if err := resume(ctx, control, int(pidfd.Fd()), way{endpoint: endpointOf(ctx, s, pid)}, &r); err != nil {
			r.note(fmt.Errorf("resume: %w", err))
		}
	}
	if r.Disks == nil {
		// Nobody left word: look all the same, as far as there is a monitor that answers.
		if m, done, err := openMonitor(ctx, way{endpoint: endpointOf(ctx, s, pid)}); err == nil {
			r.sweepDisks(ctx, m)
			done()
		} else if known {
			r.note(fmt.Errorf("disks: %w", err))
		}
	}
	closeOurs(ctx, pid, s, known, &r)
	kinds, err := armed(pid)
	r.note(err)
	r.Armed = kinds.writeProtect
	r.TookNS = time.Since(began).Nanoseconds()
	if r.Armed || len(r.Problems) > 0 {
		return r, problem.New(problem.Failed, "release", object, "%w", releaseFailure(r)).
			WithHint("if the VM is protected with --track, detach it; see who holds it: ls -l /proc/%d/fd | grep userfaultfd; grep -c ' uw' /proc/%d/smaps", pid, pid)
	}
	removeState(dir, qemu)
	cgroup.Remove(groupName(qemu))
	return r, nil
}

func releaseFailure(r Report) error {
	var errs []error
	for _, p := range r.Problems {
		errs = append(errs, errors.New(p))
	}
	if r.Armed {
		errs = append(errs, errors.New("its memory stays write-protected"))
	}
	return errors.Join(errs...)
}

// endProcesses ends guardian, agent and fault server, in that order: the guardian
// must not act on the deaths of the others while we do. A live agent is left
// alone.
func endProcesses(s state, control *Control, r *Report) error {
	if s.Agent.alive() && control != nil && control.Engaged.Load() != 0 && s.Agent.PID != os.Getpid() {
		if age := time.Duration(Now() - control.AgentBeatNS.Load()); age < AgentSilence {
			return problem.New(problem.Busy, "release", fmt.Sprintf("pid %d", s.QEMU.PID),
				"ckagent with pid %d is at work on it", s.Agent.PID).
				WithHint("cancel that checkpoint, or end that process; its guardian will then put the VM right")
		}
	}
	home := cgroup.Roots()
	r.GuardEnded = endIdentity(s.Guardian, home)
	if control != nil && control.Engaged.Load() != 0 && s.Agent.PID != os.Getpid() {
		r.AgentEnded = endIdentity(s.Agent, home)
	}
	r.ServerEnded = endIdentity(s.Server, home)
	return nil
}

// endIdentity ends one process if it is still the one meant, and alive.
func endIdentity(id identity, home cgroup.Group) bool {
	if id.PID <= 1 {
		return false
	}
	f, err := id.open()
	if err != nil {
		return false
	}
	defer f.Close()
	fd := int(f.Fd())
	if waitExit(fd, 0) {
		return false
	}
	end(fd, id.PID, home, serverPatience)
	return true
}

// endpointOf is how to reach QMP: as recorded, else as found.
func endpointOf(ctx context.Context, s state, pid int) qmp.Endpoint {
	if s.QMP.Network != "" {
		return s.QMP
	}
	found, err := qmp.Discover(ctx, pid)
	if err != nil || len(found) == 0 {
		return qmp.Endpoint{}
	}
	return found[0]
}

// closeOurs closes leftovers inside QEMU: what the state file proves to be new;
// without one, what is certainly ours, and userfaultfds that serve nothing.
func closeOurs(ctx context.Context, pid int, s state, known bool, r *Report) {
	if known {
		closeLeftovers(ctx, pid, s.Known, r)
		return
	}
	all, err := inject.FindLeftovers(pid)
	if err != nil {
		r.note(err)
		return
	}
	kinds, err := armed(pid)
	if err != nil {
		r.note(err)
		return
	}
	var keep []inject.Leftover
	for _, l := range all {
		ours := l.Certain || l.Kind == inject.KindUserfaultfd && kinds == (armedKinds{})
		if !ours {
			keep = append(keep, l)
		}
	}
	closeLeftovers(ctx, pid, keep, r)
}

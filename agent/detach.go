package agent

import (
	"context"
	"errors"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// Detach removes everything that checkpoints keep in a VM's block layer, the bitmaps
// included: its next checkpoint copies every disk whole. problem.Busy while another
// ckagent works on the VM.
func Detach(ctx context.Context, pid int, monitor string) (swept disk.Swept, err error) {
	proc, err := vm.OpenProcess(pid)
	if err != nil {
		return swept, err
	}
	defer func() { err = errors.Join(err, proc.Close()) }()
	lock, err := vm.Lock(ctx, proc)
	if err != nil {
		return swept, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	t, err := vm.Open(ctx, pid, vm.Options{QMP: monitor})
	if err != nil {
		return swept, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	if swept, err = disk.Sweep(ctx, t.QMP, true); err != nil {
		err = problem.New(problem.CodeOf(err), "detach", proc.String(), "%w", err).
			WithHint("repeat it; what is left goes with the QEMU process")
	}
	return swept, proc.Explain(err)
}

// FindByName finds the one running VM that a checkpoint would call by this name.
func FindByName(name string) (pid int, err error) {
	const op = "find VM"
	pids, err := vm.Running()
	if err != nil {
		return 0, problem.New(problem.Failed, op, name, "%w", err)
	}
	var found []int
	for _, pid := range pids {
		p, err := vm.OpenProcess(pid)
		if err != nil {
			continue // ended meanwhile, or not ours to look at
		}
		own, nerr := chooseName("", p.GivenName(), pid)
		if err := p.Close(); err != nil {
			return 0, err
		}
		if nerr == nil && own == name {
			found = append(found, pid)
		}
	}
	switch len(found) {
	case 0:
		return 0, problem.New(problem.NotFound, op, name, "no running VM has this name").WithHint("pgrep -a qemu lists them; a pid will do")
	case 1:
		return found[0], nil
	}
	return 0, problem.New(problem.Usage, op, name, "%d running VMs have this name: pids %v", len(found), found).WithHint("give the pid")
}

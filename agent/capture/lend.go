package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

const fdsetBase = 1 << 29

// lend gives QEMU the memory that the device state goes to, and returns the file
// name by which it opens it. There are two ways. A descriptor set works whatever
// QEMU may open, but QEMU closes what was taken out of a set only while the
// machine runs. Of a machine that stands still nothing would ever be given back,
// so it gets a named descriptor, which closefd closes at once.
func (p *pause) lend(ctx context.Context, proc *vm.Process) (filename string, err error) {
	s, err := vm.ReadStatus(ctx, p.q)
	if err != nil {
		return "", err
	}
	// What QEMU was sent it takes; only by its answer do we know what to take back.
	ctx, cancel := outlasting(ctx, resumeTimeout)
	defer cancel()
	if !s.Running && opensOwnDescriptors(proc) {
		if filename, err = p.lendNamed(ctx, proc); filename != "" || err != nil {
			return filename, err
		}
	}
	// QEMU takes a descriptor of a set only if it was opened exactly as it would
	// open the file itself: write only.
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", p.state.Fd()), os.O_WRONLY, 0)
	if err != nil {
		return "", fmt.Errorf("reopen the device state's memory: %w", err)
	}
	defer w.Close()
	var set struct {
		ID int `json:"fdset-id"`
	}
	// A number far from those that QEMU and libvirt would take next: what others
	// put into a set of that number would go when ours does.
	args := map[string]any{"opaque": guardian.FdsetOpaque, "fdset-id": fdsetBase + rand.IntN(fdsetBase)}
	if err := p.q.ExecuteFD(ctx, "add-fd", args, &set, w); err != nil {
		return "", err
	}
	p.fdset = set.ID
	return fmt.Sprintf("/dev/fdset/%d", set.ID), nil
}

// outlasting is a context that ends a while after its parent.
func outlasting(parent context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	stop := context.AfterFunc(parent, func() { time.AfterFunc(grace, cancel) })
	return ctx, func() { stop(); cancel() }
}

// lendNamed hands the memory over by name and looks up which number it has got.
// An empty name means that it was not found and a set has to do.
func (p *pause) lendNamed(ctx context.Context, proc *vm.Process) (filename string, err error) {
	if err := p.q.ExecuteFD(ctx, "getfd", map[string]string{"fdname": guardian.FDName}, nil, p.state); err != nil {
		return "", err
	}
	p.named = true
	ours, err := p.state.Stat()
	if err != nil {
		return "", fmt.Errorf("device state's memory: %w", err)
	}
	fds, err := proc.FDs()
	if err != nil {
		return "", fmt.Errorf("descriptors: %w", err)
	}
	for _, fd := range fds {
		theirs, err := os.Stat(proc.Path(fmt.Sprintf("fd/%d", fd.Number)))
		if err == nil && os.SameFile(ours, theirs) {
			return fmt.Sprintf("/proc/self/fd/%d", fd.Number), nil
		}
	}
	return "", p.takeBack(ctx)
}

// opensOwnDescriptors reports whether QEMU can open /proc/self/fd/N: it sees a
// /proc, and no security module judges by path what it may open.
func opensOwnDescriptors(proc *vm.Process) bool {
	var fs unix.Statfs_t
	if unix.Statfs(proc.Path("root/proc"), &fs) != nil || fs.Type != unix.PROC_SUPER_MAGIC {
		return false
	}
	label, err := os.ReadFile(proc.Path("attr/current"))
	label = bytes.TrimRight(label, "\x00\n")
	return err != nil || len(label) == 0 || bytes.HasPrefix(label, []byte("unconfined"))
}

// takeBack ends the loan; whatever became of the pause.
func (p *pause) takeBack(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	var errs []error
	give := func(command string, args any) {
		err := p.q.Execute(ctx, command, args, nil)
		// A set vanishes by itself once the state was written to it.
		if _, refused := errors.AsType[*qmp.Error](err); err != nil && !refused {
			errs = append(errs, err)
		}
	}
	if p.named {
		p.named = false
		give("closefd", map[string]string{"fdname": guardian.FDName})
	}
	if p.fdset >= 0 {
		give("remove-fd", map[string]int{"fdset-id": p.fdset})
		p.fdset = -1
	}
	return errors.Join(errs...)
}

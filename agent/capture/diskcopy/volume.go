package diskcopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// makeVolume creates an empty qcow2 file. Its backing file, if any, lies beside it
// and is named without a directory, so that the chain can be moved as a whole.
func makeVolume(ctx context.Context, path, backing string, size uint64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, problem.New(problem.Store, "create volume", path, "%w", err)
	}
	if err := format(ctx, f, backing, "qcow2", size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// makeMemory creates an empty qcow2 image in memory that cannot grow beyond limit.
func makeMemory(ctx context.Context, size, limit uint64) (*os.File, error) {
	fd, err := unix.MemfdCreate("ckagent-fleece", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memory for disks: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory for disks")
	if err := format(ctx, f, "", "", size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	err = f.Truncate(int64(limit))
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("bound the memory for disks: %w", err), f.Close())
	}
	return f, nil
}

// format has qemu-img write an empty image into an open file. The image below it is
// not looked at.
func format(ctx context.Context, f *os.File, backing, backingFormat string, size uint64) error {
	args := []string{"create", "-q", "-f", "qcow2"}
	if backing != "" {
		args = append(args, "-u", "-F", backingFormat, "-b", backing)
	}
	args = append(args, "/proc/self/fd/3", strconv.FormatUint(size, 10))
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	cmd.ExtraFiles = []*os.File{f}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return problem.New(problem.Refused, "create volume", f.Name(), "qemu-img is not installed").
			WithHint("install qemu-utils, or leave disks out with --disks none")
	}
	if err != nil && ctx.Err() != nil { // it was ended by us, and failed by that
		return problem.New(problem.CodeOf(ctx.Err()), "create volume", f.Name(), "%w", ctx.Err())
	}
	if err != nil {
		return problem.New(problem.Store, "create volume", f.Name(), "qemu-img: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// volumePath is where a volume lies.
func (s *Set) volumePath(name string) string { return filepath.Join(s.dir, name) }

// addVolume makes the volume of a disk and lends it to QEMU.
func (s *Set) addVolume(ctx context.Context, d *item, bytes uint64) (err error) {
	backing := ""
	if d.base != nil {
		backing = d.base.chain[0].Name
	}
	if d.file, err = makeVolume(ctx, s.volumePath(d.volume), backing, bytes); err != nil {
		return err
	}
	return s.lend(ctx, disk.TargetNode(d.n), disk.FdsetOpaque, d.file, nil, "io_uring")
}

// storeAnswers asks the store for each volume's size, as QEMU is about to: it would ask in
// the thread that also serves the guest's devices, which a store that hangs would hold.
func (s *Set) storeAnswers(ctx context.Context) error {
	var files []*os.File
	for _, d := range s.items {
		if d.file != nil {
			files = append(files, d.file)
		}
	}
	answered := make(chan error, 1)
	go func() { // ends when the store answers; who waits for it goes on without it
		var errs []error
		for _, f := range files {
			var st unix.Statx_t
			errs = append(errs, unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &st))
		}
		answered <- errors.Join(errs...)
	}()
	late := time.NewTimer(s.c.Stall)
	defer late.Stop()
	select {
	case err := <-answered:
		if err != nil {
			return problem.New(problem.Store, "copy disks", "VM "+s.c.VM, "the store: %w", err)
		}
		return nil
	case <-late.C:
		return problem.New(problem.Store, "copy disks", "VM "+s.c.VM, "the store did not answer for %v", s.c.Stall).
			WithHint("the store hangs; the checkpoint was given up and the VM goes on")
	case <-ctx.Done():
		return problem.New(problem.Cancelled, "copy disks", "VM "+s.c.VM, "%w", context.Cause(ctx))
	}
}

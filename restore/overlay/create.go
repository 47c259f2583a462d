package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Spec describes one overlay.
type Spec struct {
	Path      string // of the file to be made; its directory must be there
	Backing   string // absolute path of the image below
	Format    string // of that: qcow2 or raw
	Snapshot  string // internal snapshot of Backing that is meant; only for Copy
	SizeBytes uint64 // that the guest sees
	UID, GID  int    // whose the file is to be
}

// Create makes an empty overlay over an image, which is not opened. A file that is
// there already is refused: it may be the disk of a VM that was restored before.
func Create(ctx context.Context, s Spec) error {
	if s.Snapshot != "" {
		return problem.New(problem.Failed, "make disk", s.Path, "an internal snapshot cannot lie below another image")
	}
	return s.make(ctx, "create", "-q", "-f", "qcow2", "-u", "-b", s.Backing, "-F", s.Format, "--", s.Path, strconv.FormatUint(s.SizeBytes, 10))
}

// Copy makes an image of its own, with all that the chain holds.
func Copy(ctx context.Context, s Spec) error {
	args := []string{"convert", "-q", "-f", s.Format, "-O", "qcow2"}
	if s.Snapshot != "" {
		args = append(args, "-l", "snapshot.name="+s.Snapshot)
	}
	return s.make(ctx, append(args, "--", s.Backing, s.Path)...)
}

// Exists is the refusal to make a file that is there.
func Exists(path string) error {
	return problem.New(problem.Refused, "make disk", path, "%w", os.ErrExist).
		WithHint("it may be the disk of a VM restored before: name another directory with --disk-dir")
}

// make runs qemu-img on a file that exists from here on, with its final owner.
func (s Spec) make(ctx context.Context, args ...string) (err error) {
	f, err := os.OpenFile(s.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		if errors.Is(err, os.ErrExist) {
			return Exists(s.Path)
		}
		return problem.New(codeOf(err), "make disk", s.Path, "%w", err).
			WithHint("--disk-dir DIR names another place for the restored VM's disks")
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(s.Path)
		}
	}()
	if _, err := run(ctx, args...); err != nil {
		return problem.New(codeOf(err), "make disk", s.Path, "%w", err)
	}
	if s.UID != os.Geteuid() {
		if err := f.Chown(s.UID, s.GID); err != nil {
			return problem.New(problem.Failed, "make disk", s.Path, "%w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return problem.New(codeOf(err), "make disk", s.Path, "%w", err)
	}
	return nil
}

// Same reports whether an image holds, byte for byte, what another one does.
func Same(ctx context.Context, path, format, other, otherFormat string) (bool, error) {
	_, err := run(ctx, "compare", "-q", "-f", format, "-F", otherFormat, "--", path, other)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		return false, nil
	}
	if err != nil {
		return false, problem.New(problem.Failed, "compare", path, "%w", err)
	}
	return true, nil
}

// CheckImage has qemu-img look for broken metadata in a qcow2 image.
func CheckImage(ctx context.Context, path string) error {
	_, err := run(ctx, "check", "-q", "-f", "qcow2", "--", path)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 3 {
		return nil // leaked clusters: room that is lost, nothing that is wrong
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return problem.New(problem.Cancelled, "check", path, "%w", context.Cause(ctx))
	}
	return problem.New(problem.Integrity, "check", path, "%w", err)
}

func codeOf(err error) problem.Code {
	switch {
	case errors.Is(err, context.Canceled):
		return problem.Cancelled
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return problem.Store
	}
	return problem.Failed
}

// maxMessage bounds what of a program's complaint goes into an error.
const maxMessage = 1000

// run runs qemu-img. LC_ALL=C: its messages go into ours.
func run(ctx context.Context, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, "qemu-img", args...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	c.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	switch {
	case err == nil:
		return out.Bytes(), nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("%w (it is in the package qemu-utils)", err)
	}
	said := strings.Join(strings.Fields(errs.String()), " ")
	if len(said) > maxMessage {
		said = said[:maxMessage] + "..."
	}
	if strings.Contains(said, unix.ENOSPC.Error()) || strings.Contains(said, "No space left on device") {
		return nil, fmt.Errorf("qemu-img %s: %w: %s", args[0], unix.ENOSPC, said)
	}
	return nil, fmt.Errorf("qemu-img %s: %w: %s", args[0], err, said)
}

// DirectIO reports whether files in a directory can be opened past the page cache,
// which QEMU does with cache=none and what is like it.
func DirectIO(dir string) bool {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_WRONLY|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		// No nameless files there: try one with a name.
		path := filepath.Join(dir, ".ckagent-direct-"+strconv.Itoa(os.Getpid()))
		f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_DIRECT, 0o600)
		defer os.Remove(path)
	}
	if err != nil {
		return !errors.Is(err, unix.EINVAL)
	}
	f.Close()
	return true
}

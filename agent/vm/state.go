package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"golang.org/x/sys/unix"
)

// Status is QEMU's run state.
type Status struct {
	State   string `json:"status"` // running, paused, prelaunch, inmigrate, ...
	Running bool   `json:"running"`
}

// ReadStatus asks for the run state.
func ReadStatus(ctx context.Context, q Monitor) (Status, error) {
	var s Status
	if err := q.Execute(ctx, "query-status", nil, &s); err != nil {
		return Status{}, fmt.Errorf("query-status: %w", err)
	}
	return s, nil
}

// Status asks for the run state.
func (t *Target) Status(ctx context.Context) (Status, error) { return ReadStatus(ctx, t.QMP) }

// checkpointable are the run states a checkpoint can be taken in. A machine that
// was not running is never set running by us.
var checkpointable = map[string]bool{"running": true, "paused": true, "prelaunch": true}

// stateAdvice says why other states are refused and what to do.
var stateAdvice = map[string][2]string{
	"inmigrate":      {"it waits for an incoming migration", "wait until the migration has arrived"},
	"postmigrate":    {"it was migrated away and may run elsewhere", "protect the VM where it runs now"},
	"finish-migrate": {"a migration is completing", "wait for it to end"},
	"save-vm":        {"its state is being saved", "wait for it to end"},
	"restore-vm":     {"its state is being loaded", "wait for it to end"},
	"internal-error": {"KVM stopped it on an error it cannot go on from", "reset or end the VM"},
	"guest-panicked": {"the guest has panicked", "reset the VM; its last checkpoint may be restored"},
	"shutdown":       {"the guest has shut down", "start it again"},
	"suspended":      {"the guest sleeps (S3), which QEMU does not save rightly", "wake the guest"},
	"io-error":       {"a disk error stopped it", "mend the disk and let it go on"},
	"debug":          {"a debugger holds it", "detach the debugger"},
	"watchdog":       {"its watchdog stopped it", "reset the VM or let it go on"},
	"colo":           {"it is half of a COLO pair", "stop the replication"},
	"preconfig":      {"it is not configured yet", "finish its configuration"},
}

// Pause stops a running machine and reports whether it was running. A machine
// that did not run is left alone: Resume after wasRunning=false must not happen.
func (t *Target) Pause(ctx context.Context) (wasRunning bool, err error) {
	s, err := t.Status(ctx)
	if err != nil || !s.Running {
		return false, err
	}
	if err := t.QMP.Execute(ctx, "stop", nil, nil); err != nil {
		return true, problem.New(problem.CodeOf(err), "pause", t.Process.String(), "%w", err)
	}
	return true, nil
}

// Resume lets a machine go on that we paused.
func (t *Target) Resume(ctx context.Context) error {
	if err := t.QMP.Execute(ctx, "cont", nil, nil); err != nil {
		return problem.New(problem.CodeOf(err), "resume", t.Process.String(), "%w", err)
	}
	return nil
}

const (
	flushQuick  = 5 * time.Millisecond // what a pause may spend on flushing again
	flushRounds = 5
)

// FlushReport says what FlushDisks did.
type FlushReport struct {
	Nodes  int           `json:"nodes"` // writable block nodes
	Rounds int           `json:"rounds"`
	Last   time.Duration `json:"last_ns"`  // duration of the last round
	Quick  bool          `json:"quick"`    // the last round was short enough
	Total  time.Duration `json:"total_ns"` // of all
}

// FlushDisks writes back what is cached of writable images, so that `stop`, which
// flushes every disk, has little left to do: rounds until one is quick, at most
// five. Without a writable node it does nothing. The bulk is flushed from outside
// (fdatasync on the very files), which holds none of QEMU's locks; only the rest,
// caches inside QEMU, is flushed through its monitor.
func (t *Target) FlushDisks(ctx context.Context) (FlushReport, error) {
	var r FlushReport
	disks, err := t.Disks(ctx)
	if err != nil {
		return r, err
	}
	var nodes []string
	for i := range disks {
		if d := &disks[i]; d.Writable() && d.Node != "" {
			nodes = append(nodes, d.Node)
		}
	}
	if r.Nodes = len(nodes); r.Nodes == 0 {
		r.Quick = true
		return r, nil
	}
	start := time.Now()
	for r.Rounds < flushRounds && !r.Quick {
		round := time.Now()
		if err := t.syncFiles(ctx); err != nil {
			return r, err
		}
		for _, n := range nodes {
			out, err := t.QMP.HMP(ctx, "qemu-io "+quoteHMP(n)+" flush")
			if err != nil {
				return r, problem.New(problem.CodeOf(err), "flush", n, "%w", err)
			}
			if s := strings.TrimSpace(out); s != "" {
				return r, problem.New(problem.Failed, "flush", n, "QEMU says: %.200s", s)
			}
		}
		r.Last = time.Since(round)
		r.Quick = r.Last <= flushQuick
		r.Rounds++
	}
	r.Total = time.Since(start)
	return r, nil
}

// quoteHMP makes one word of a node name ("#block114").
func quoteHMP(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// syncFiles writes back every regular file and block device QEMU has open for
// writing.
func (t *Target) syncFiles(ctx context.Context) error {
	fds, err := t.Process.FDs()
	if err != nil {
		return err
	}
	for _, fd := range fds {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !strings.HasPrefix(fd.Target, "/") || !fd.Writable() {
			continue
		}
		path := t.Process.Path("fd/" + strconv.Itoa(fd.Number))
		fi, err := os.Stat(path)
		if err != nil {
			continue
		}
		if !fi.Mode().IsRegular() && fi.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
			continue
		}
		// A descriptor of our own on the same inode; QEMU's locks belong to its
		// open file descriptions and are not touched by closing this one.
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		err = unix.Fdatasync(int(f.Fd()))
		f.Close()
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EROFS) {
			return problem.New(problem.Failed, "flush", fd.Target, "fdatasync: %w", err)
		}
	}
	return nil
}

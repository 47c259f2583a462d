package signals

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/vm"
)

// WatchOptions say what is watched.
type WatchOptions struct {
	PIDs []int // empty: every QEMU of this host
	// Match is a pattern (path.Match) that the names of VMs found have to match; empty:
	// all do.
	Match string
	QMP   string // of a single VM; empty: found from the process
	Take  track.Take
	// Gap is the silence that makes an idle slot of a network.
	Gap time.Duration
	// DirtyEvery is the time between two dirty-rate windows of a VM; 0: none.
	DirtyEvery time.Duration
	// MaxShare is how much of memory a window arms at most.
	MaxShare float64
}

// Watcher follows VMs, as they come and go.
type Watcher struct {
	o      WatchOptions
	kernel *Kernel

	mu  sync.Mutex // guards vms, last and what sampling leaves in them
	vms map[int]*watched

	last    Snapshot
	sampler sync.WaitGroup
	cancel  context.CancelFunc
}

// NewWatcher loads the programs and, if asked for, begins to sample dirty rates.
func NewWatcher(ctx context.Context, o WatchOptions) *Watcher {
	w := &Watcher{o: o, kernel: LoadKernel(), vms: map[int]*watched{}}
	if o.Gap <= 0 {
		w.o.Gap = time.Millisecond
	}
	ctx, w.cancel = context.WithCancel(ctx)
	if o.DirtyEvery > 0 && o.Take != nil {
		w.sampler.Go(func() { w.sampleDirty(ctx) })
	}
	return w
}

// Kernel is the programs in use.
func (w *Watcher) Kernel() *Kernel { return w.kernel }

// Close lets go of every VM and of the programs.
func (w *Watcher) Close() error {
	w.cancel()
	w.sampler.Wait()
	var errs []error
	for _, v := range w.vms {
		errs = append(errs, v.close(w.kernel))
	}
	return errors.Join(append(errs, w.kernel.Close())...)
}

// find lists the VMs that are there.
func (w *Watcher) find() []int {
	if len(w.o.PIDs) > 0 {
		return w.o.PIDs
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
	var out []int
	for _, d := range dirs {
		exe, err := os.Readlink(d + "/exe")
		if err != nil || !vm.AllowedBinary(exe) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil || w.o.Match != "" && !matches(w.o.Match, nameOf(arguments(pid))) {
			continue
		}
		out = append(out, pid)
	}
	return out
}

func matches(pattern, name string) bool {
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}

// Look attaches what is new, drops what has ended, and reads everything. VMs that
// were named and do not exist are an error; others come and go.
func (w *Watcher) Look(ctx context.Context) (Snapshot, error) {
	found := w.find()
	for _, pid := range found {
		if w.get(pid) != nil {
			continue
		}
		v, err := attach(ctx, pid, w.o, w.kernel)
		if err != nil {
			if len(w.o.PIDs) > 0 {
				return Snapshot{}, err
			}
			continue // it ended just now, or is another user's
		}
		w.mu.Lock()
		w.vms[pid] = v
		w.mu.Unlock()
	}
	now := time.Now()
	s := Snapshot{Time: now, VMs: []Sample{}, Missing: append([]Lack{}, w.kernel.Missing...)}
	var errs []error
	for _, pid := range w.pids() {
		v := w.get(pid)
		if !v.process.Alive() {
			errs = append(errs, w.drop(pid))
			continue
		}
		x, err := v.read(w.kernel, now)
		if err != nil {
			if v.process.Alive() {
				errs = append(errs, err)
			}
			continue // ended while we read: gone at the next look
		}
		w.mu.Lock()
		x.Dirty, x.DirtyNote = v.dirty.sample(now)
		w.mu.Unlock()
		s.VMs = append(s.VMs, x)
	}
	if len(w.o.PIDs) > 0 && len(s.VMs) == 0 && len(errs) == 0 {
		errs = append(errs, problem.New(problem.NotFound, "watch", "", "the VMs have ended"))
	}
	w.mu.Lock()
	w.last = s
	w.mu.Unlock()
	return s, errors.Join(errs...)
}

// Last is the last snapshot.
func (w *Watcher) Last() Snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

func (w *Watcher) get(pid int) *watched {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.vms[pid]
}

func (w *Watcher) pids() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]int, 0, len(w.vms))
	for pid := range w.vms {
		out = append(out, pid)
	}
	slices.Sort(out)
	return out
}

func (w *Watcher) drop(pid int) error {
	w.mu.Lock()
	v := w.vms[pid]
	delete(w.vms, pid)
	w.mu.Unlock()
	// A window of it may be running: a VM that has ended fails it quickly.
	v.busy.Lock()
	defer v.busy.Unlock()
	v.gone = true
	return v.close(w.kernel)
}

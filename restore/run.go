package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/guestagent"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/netid"
	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/restore/plan"
)

// progressEvery is how often OnDrain is called.
const progressEvery = 200 * time.Millisecond

// drainAfter is when a drain begins that we did not release, though the guest asks
// for memory: a device state is loaded in a fraction of it.
const drainAfter = 10 * time.Second

// run is one restore.
type run struct {
	o      Options
	began  time.Time
	r      *image.Reader
	m      *image.Manifest
	source *pager.SourceSpec // of the same checkpoint, for the pager
	res    *Result
	plan   *plan.Plan
	dir    *runDir
	q      *qemu
	warm   *pager.Warm
	pager  *pager.Process
	older  bool               // the QEMU to be started is older than the recorded one, and knows all there is
	agent  guestagent.Channel // zero: nothing is wanted of the guest's agent

	cpuNote string

	keep     keeper // nil outside a store
	giveBack []func() error
}

// RunImage restores the checkpoint behind an opened reader, which it leaves open.
// The checkpoint's files must stay in place until the drain is over; that is the
// caller's business. Times count from began.
func RunImage(ctx context.Context, r *image.Reader, began time.Time, o Options) (*Result, error) {
	params, err := json.Marshal(map[string]string{"dir": r.Dir()})
	if err != nil {
		return nil, problem.New(problem.Failed, "restore", r.Dir(), "%w", err)
	}
	return newRun(r, &pager.SourceSpec{Kind: pager.SourceImage, Params: params}, began, o).do(ctx)
}

func newRun(r *image.Reader, source *pager.SourceSpec, began time.Time, o Options) *run {
	o.fill()
	o.nameClone()
	m := r.Manifest()
	o.nameDisks(m)
	return &run{o: o, began: began, r: r, m: m, source: source, res: &Result{
		Schema: Schema, ID: m.ID, VM: m.VM, Lazy: !o.Eager, Clone: o.CloneID,
		RAMBytes: ramBytes(m), Clock: clockGuest, Disks: []DiskResult{}, Phases: []Phase{}, Changes: []plan.Change{}, Notes: []string{},
	}}
}

func ramBytes(m *image.Manifest) (n uint64) {
	for _, b := range m.Blocks {
		n += b.UsedBytes
	}
	return n
}

func (x *run) phase(name string, at time.Time) {
	p := Phase{Name: name, AtNS: at.Sub(x.began).Nanoseconds()}
	x.res.Phases = append(x.res.Phases, p)
	if x.o.OnPhase != nil {
		x.o.OnPhase(p)
	}
}

func (x *run) note(format string, args ...any) {
	x.res.Notes = append(x.res.Notes, fmt.Sprintf(format, args...))
}

func (x *run) do(ctx context.Context) (*Result, error) {
	cgroup.Sweep()
	if _, err := Sweep(x.o.RunRoot); err != nil {
		x.note("run directories of VMs that are gone could not be removed: %v", err)
	}
	if !x.o.Clone {
		guard, err := liveness.Hold(x.o.RunRoot, x.m.VM)
		if err != nil {
			return nil, err
		}
		defer guard.Close()
	}
	if err := x.prepare(ctx); err != nil {
		x.undo()
		return nil, err
	}
	err := x.bringUp(ctx)
	var left leftAlone
	if err != nil && !errors.As(err, &left) {
		x.undo()
		return nil, err
	}
	// The guest runs, or may: nothing below takes it away again.
	defer x.q.letGo()
	x.pager.Release()
	if err != nil {
		return x.res, errors.Join(err, x.pager.Detach())
	}
	x.attend(ctx)
	return x.res, x.drain(ctx)
}

// undo removes everything a failed restore made.
func (x *run) undo() {
	if x.q != nil {
		x.q.kill() // first: the pager's processes end when what they serve does
	}
	if x.warm != nil {
		x.warm.Abort()
	}
	if x.pager != nil {
		_ = x.pager.Wait(context.Background()) // its QEMU is dead: it ends at once
		x.pager.Close()
	}
	if x.plan != nil && !strings.HasPrefix(x.plan.QMPPath, x.plan.RunDir+"/") && x.q != nil {
		_ = os.Remove(x.plan.QMPPath)
	}
	if x.dir != nil {
		x.dir.state.removeDisks()
	}
	_ = x.give() // what is left names a dead process or a file that is gone: gc finds it
	if x.dir != nil {
		_ = x.dir.remove()
	}
}

// prepare is everything before QEMU is started.
func (x *run) prepare(ctx context.Context) (err error) {
	if err := judgeDisks(x.m, x.o.Disks); err != nil {
		return err
	}
	name := x.m.VM
	if x.o.Clone {
		name += "-clone-" + x.o.CloneID
	}
	if x.dir, err = reserveRunDir(x.o.RunRoot, name); err != nil {
		return err
	}
	if x.plan, err = makePlan(x.m, x.o, x.dir.path); err != nil {
		return err
	}
	p := x.plan
	if err := checkBinary(p.Binary, x.o.Binary != ""); err != nil {
		return err
	}
	if err := x.checkVersion(ctx); err != nil {
		return err
	}
	if !x.o.Clone && !x.o.AssumeDead {
		doubts, err := liveness.Check(ctx, subject(x.m, p))
		if err != nil {
			return problem.New(problem.Refused, "restore", "VM "+x.m.VM, "whether the original lives cannot be told: %w", err).
				WithHint("--assume-dead restores it all the same")
		}
		if d, ok := managed(ctx, x.m, p); ok {
			doubts = append(doubts, d)
		}
		if len(doubts) > 0 {
			what := make([]string, len(doubts))
			for i, d := range doubts {
				what[i] = d.String()
			}
			return problem.New(problem.Refused, "restore", "VM "+x.m.VM, "it may still be alive: %s", strings.Join(what, "; ")).
				WithHint("end it first; --clone makes a second VM without network, --assume-dead overrides when you know that it is dead")
		}
	}
	if err := preflight(ctx, p); err != nil {
		return err
	}
	if err := x.checkClock(); err != nil {
		return err
	}
	for _, c := range netid.Conflicts(p.NICs) {
		x.note("%s", c)
	}
	if err := x.dir.own(p.UID, p.GID); err != nil {
		return problem.New(problem.Failed, "make run directory", x.dir.path, "%w", err)
	}
	boot, err := liveness.BootID()
	if err != nil {
		return problem.New(problem.Failed, "read boot id", "", "%w", err)
	}
	self, err := startTicks(os.Getpid())
	if err != nil {
		return problem.New(problem.Failed, "read start time", "", "%w", err)
	}
	x.dir.state = state{Checkpoint: x.m.ID, VM: x.m.VM, Name: p.Name, BootID: boot, Restorer: identity{os.Getpid(), self}, Rehearsal: x.o.rehearsal}
	if x.dir.state.Disks, x.dir.state.DiskDir, err = x.disksToMake(); err != nil {
		return err
	}
	if err := x.dir.save(); err != nil {
		return err
	}
	if err := x.disks(ctx); err != nil {
		return err
	}
	x.res.Name, x.res.QMP, x.res.RunDir, x.res.Changes, x.res.Paused = p.Name, p.QMPPath, p.RunDir, p.Changes, p.Paused
	x.phase(PhasePlanned, time.Now())
	return nil
}

// bringUp starts QEMU and returns when the guest runs.
func (x *run) bringUp(ctx context.Context) error {
	slow, stop := context.WithTimeoutCause(ctx, x.o.StartWithin, fmt.Errorf("%w: QEMU was not up within %v", errTooSlow, x.o.StartWithin))
	defer stop()
	var err error
	if x.q, err = launch(slow, x.plan); err != nil {
		return err
	}
	q := x.q
	x.res.QEMUPID = q.child.Pid
	// At once: who is killed from here on leaves a QEMU that Sweep must find.
	if err := x.dir.adopt(identity{q.child.Pid, q.started}); err != nil {
		return err
	}
	if err := x.lend(slow); err != nil {
		return err
	}
	x.phase(PhaseStarted, time.Now())

	// While QEMU starts: the pager's processes and the stream.
	var stream *feed
	defer func() {
		if stream != nil {
			stream.close()
		}
	}()
	var early errgroup.Group
	early.Go(func() (err error) {
		x.warm, err = pager.Prestart(slow, x.o.Self, x.dir.path, x.source)
		return err
	})
	early.Go(func() (err error) {
		stream, err = x.stream(slow)
		return err
	})
	early.Go(func() error {
		cgroup.Move(q.child.Pid, groupName(q.child.Pid))
		return nil
	})
	greetErr := q.awaitGreeting(slow)
	greeted := time.Now()
	if err := early.Wait(); err != nil {
		return err
	}
	if greetErr != nil {
		return q.failed(slow, "start", greetErr)
	}
	x.phase(PhaseGreeted, greeted)
	if err := q.identify(); err != nil {
		return q.failed(slow, "start", err)
	}

	// The machine is still being built; the userfaultfd does not need it.
	var made errgroup.Group
	remote := -1
	made.Go(func() error {
		local, fd, err := inject.Userfaultfd(slow, q.proc.PID, inject.Options{KeepInside: true})
		if err != nil {
			return err
		}
		remote = fd
		return local.Close() // the one inside keeps it alive
	})
	c, cerr := qmp.NewClient(slow, q.conn)
	ready := time.Now()
	if c != nil {
		defer c.Close()
	}
	if err := made.Wait(); err != nil && cerr == nil {
		return err
	}
	if cerr != nil {
		return q.failed(slow, "start", cerr)
	}
	x.phase(PhaseReady, ready)
	x.res.ReadyNS = ready.Sub(x.began).Nanoseconds()

	loadCtx, stopLoad := context.WithTimeoutCause(ctx, x.o.LoadWithin, fmt.Errorf("%w: the state was not loaded within %v", errTooSlow, x.o.LoadWithin))
	defer stopLoad()
	if err := x.arm(loadCtx, c, stream, remote); err != nil {
		return err
	}
	if err := x.dir.reached(stageTold); err != nil {
		return err
	}
	l, err := load(loadCtx, c, stream, !x.plan.Paused)
	if err != nil && !x.plan.Paused && mayRun(q, stream, err) {
		return leftAlone{problem.New(problem.CodeOf(err), "restore", q.object(), "it was told to let the guest run and did not say that it does: %w", err).
			WithHint("nothing was taken away from it: look at it by its monitor %s, and end it if it hangs", x.plan.QMPPath)}
	}
	if err != nil {
		return x.loadError(loadCtx, err)
	}
	if serr := x.dir.reached(stageRuns); serr != nil {
		// Not worth ending a guest that runs: who finds this out asks QEMU.
		x.note("%v", serr)
	}
	end := l.at
	x.phase(PhaseFed, l.at)
	if !x.plan.Paused {
		end = l.running
		x.phase(PhaseRunning, l.running)
	}
	x.res.ResumeNS = end.Sub(ready).Nanoseconds()
	x.res.CommandToRunningNS = end.Sub(x.began).Nanoseconds()
	x.present(ctx, c)
	if x.o.Detach {
		if err := x.flatten(loadCtx, c); err != nil {
			return leftAlone{err}
		}
	}
	return nil
}

// stream makes the migration stream.
func (x *run) stream(ctx context.Context) (*feed, error) {
	state, err := x.r.DeviceState(ctx)
	if err != nil {
		return nil, err
	}
	s, err := vmstate.Stream(x.m.Machine.Type, state)
	if err != nil {
		return nil, problem.New(problem.Integrity, "read device state", x.m.ID, "%w", err).
			WithHint("this checkpoint is damaged: restore another one")
	}
	f, err := newFeed(s)
	if err != nil {
		return nil, problem.New(problem.Failed, "make stream", x.m.ID, "%w", err)
	}
	return f, nil
}

// arm finds the memory, hands QEMU the stream, and starts the pager.
func (x *run) arm(ctx context.Context, c *qmp.Client, stream *feed, remote int) error {
	q := x.q
	if v := c.Version(); !x.older && olderThan(v, x.m.QEMU.Version) {
		return x.tooOld(v.String(), "it was replaced by an older one since")
	}
	var g errgroup.Group
	g.Go(func() error { return handFeed(ctx, c, stream) })
	g.Go(func() error { return x.checkCPU(ctx, c) })
	blocks, err := vm.ResolveLayout(ctx, q.proc, c, hints(x.m))
	if herr := g.Wait(); err == nil {
		err = herr
	}
	if problem.Is(err, problem.Refused) {
		return err
	}
	if err != nil {
		return q.failed(ctx, "prepare", err)
	}
	x.phase(PhaseLayout, time.Now())
	mp, err := planMemory(ctx, x.m, blocks, q.proc.PID, x.o.Eager)
	if err != nil {
		return err
	}
	x.res.Notes = append(x.res.Notes, mp.notes...)
	x.res.LazyBytes, x.res.Lazy = mp.lazy, mp.lazy > 0
	warm := x.warm
	x.warm = nil // Start ends it if it fails
	x.pager, err = warm.Start(ctx, pager.Config{
		Source: x.source, QEMUPID: q.proc.PID, QEMUStart: q.proc.StartTicks, RemoteFD: remote,
		Blocks: mp.blocks, BytesPerSecond: x.o.BytesPerSecond,
		// Until the guest runs: the drain would take the processor from the load.
		NoDrain: true, DrainAfter: drainAfter,
	})
	if err != nil {
		if !q.proc.Alive() {
			return q.failed(ctx, "arm", err)
		}
		return err
	}
	x.phase(PhaseArmed, time.Now())
	return nil
}

// drain waits until all memory is in, unless the caller does not want to.
func (x *run) drain(ctx context.Context) error {
	if x.o.Detach {
		return x.pager.Detach()
	}
	done := make(chan error, 1)
	go func() { done <- x.pager.Wait(ctx) }()
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if x.o.OnDrain != nil {
				s := x.pager.Stats()
				x.o.OnDrain(Progress{Bytes: x.res.LazyBytes - min(x.res.LazyBytes, uint64(max(s.LeftPages, 0))*pager.PageBytes),
					TotalBytes: x.res.LazyBytes, Faults: s.Faults})
			}
		case err := <-done:
			s := x.pager.Stats()
			x.res.Faults = s.Faults
			if err != nil {
				// Whoever stopped waiting does not stop the VM.
				if derr := x.pager.Detach(); derr != nil {
					err = errors.Join(err, derr)
				}
				return err
			}
			now := time.Now()
			x.phase(PhaseDrained, now)
			x.res.DrainedNS = now.Sub(x.began).Nanoseconds()
			if err := x.pager.Detach(); err != nil {
				return err
			}
			return x.afterDrain(ctx)
		}
	}
}

// afterDrain is what waits until the guest has all of its memory.
func (x *run) afterDrain(ctx context.Context) error {
	if !x.o.FlattenDisks || len(x.diskPaths()) == 0 {
		return nil
	}
	if err := x.awaitFlat(ctx); err != nil {
		return err
	}
	now := time.Now()
	x.phase(PhaseFlat, now)
	x.res.FlatNS = now.Sub(x.began).Nanoseconds()
	return x.give()
}

package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
)

// FaultServerVerb is the hidden verb of Options.Helper that leads to
// faultserver.Main; the guardian has its own.
const FaultServerVerb = "__faultserver"

// Subject is what to take a checkpoint of.
type Subject struct {
	Target  *vm.Target // open, its layout resolved
	Name    string     // of the VM in the store
	Machine image.Machine
	QEMU    image.QEMU
	Lock    *os.File // of the VM (vm.FileLock), for the guardian to hold on to
}

// Result is a checkpoint that exists.
type Result struct {
	Manifest *image.Manifest
	Timing   Timing
	Capture  faultserver.Stats // mode cow
	Image    image.Progress
	Reason   string   // why mode auto was not mode cow from the first attempt on; empty otherwise
	Untried  bool     // engine auto did without bpf because nobody had tried that on this host
	Retaken  []string // why earlier attempts were discarded
	Notes    []string // what went wrong beside it
	PID      int
}

// Take takes one checkpoint. The VM runs on as before whatever it returns; an
// error means that there is no new checkpoint. Codes: problem.Refused, .Store,
// .Busy (try again), .Cancelled, .Failed.
func Take(ctx context.Context, sub Subject, st *store.Store, o Options) (*Result, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	o.Helper = selfexe.Or(o.Helper)
	var lacks error
	if o.Mode == Auto || o.Mode == COW {
		lacks = faultserver.Supported()
	}
	mode, why, err := chooseMode(sub.Target.Blocks, o.Mode, lacks)
	if err != nil {
		return nil, err
	}
	if why != "" {
		o.tell("mode", 0, "%s: %s", mode, why)
	}
	res := &Result{PID: sub.Target.Process.PID, Reason: why}
	engine := EngineNone
	if mode == COW {
		var lacks error
		if engine, lacks, err = chooseEngine(ctx, sub.Target, o.Engine, o.Proofs); err != nil {
			return nil, err
		}
		if res.Untried = errors.Is(lacks, ErrUntried); lacks != nil {
			o.tell("engine", 0, "%s: %v", engine, lacks)
		}
	}
	for p := newPlan(mode, engine, o.Mode); ; {
		res.Capture, res.Timing = faultserver.Stats{}, Timing{} // of this attempt alone
		s := &session{sub: sub, target: sub.Target, o: o, attempt: p.attempts[0], store: st, res: res,
			object: fmt.Sprintf("VM %s (pid %d)", sub.Name, sub.Target.Process.PID)}
		if err = s.take(ctx); err == nil {
			return res, nil
		}
		if lost := o.Track.Close(); lost != nil { // marks of a checkpoint that is none
			err = errors.Join(err, lost)
		}
		if !p.next(err) {
			break
		}
		res.Retaken = append(res.Retaken, err.Error())
		o.tell("retake", 0, "%v", err)
	}
	return nil, sub.Target.Process.Explain(err)
}

// session is one attempt.
type session struct {
	sub    Subject
	target *vm.Target
	o      Options
	attempt
	store  *store.Store
	object string
	res    *Result

	src    *source.Source
	blocks []source.Block
	writer *image.Writer
	parent string // checkpoint that this one continues; empty: it is a full one
	depth  int
	disks  diskMethod
	left   []image.Disk // disks that are left out
	// tracked: pages not written since the parent are known by marks (Options.Track).
	tracked bool

	migration vm.Migration // as it was before anything was done
}

// unmigrated lets go (problem.Busy) if somebody has started a migration or a
// snapshot: it uses the same machinery in QEMU, and moves the machine's state away
// while we look at it. One that came and went counts as well.
func (s *session) unmigrated(ctx context.Context) error {
	now, err := s.target.Migration(ctx)
	if err != nil {
		return problem.New(problem.CodeOf(err), "checkpoint", s.object, "%w", err)
	}
	if now.Idle() && now == s.migration {
		return nil
	}
	return problem.New(problem.Busy, "checkpoint", s.object, "somebody migrates the VM (%s)", now.Status).
		WithHint("wait for the migration to end or cancel it, and take the checkpoint again")
}

// take runs one attempt from nothing to a committed checkpoint or to nothing.
func (s *session) take(ctx context.Context) (err error) {
	begin := time.Now()
	var ram uint64
	blocks := imageBlocks(s.target.Blocks)
	for i, b := range blocks {
		ram += b.UsedBytes
		s.blocks = append(s.blocks, sourceBlock(&s.target.Blocks[i]))
	}
	if s.src, err = source.Open(s.target.Process.PID, s.blocks); err != nil {
		return problem.New(problem.Failed, "read RAM", s.object, "%w", err)
	}
	defer func() { err = errors.Join(err, s.src.Close()) }()
	need, err := s.neededBytes()
	if err != nil {
		return err
	}
	if err := s.store.CheckSpace(need, s.o.MinFreeBytes); err != nil {
		return err
	}
	if s.migration, err = s.target.Migration(ctx); err != nil {
		return problem.New(problem.CodeOf(err), "checkpoint", s.object, "%w", err)
	}
	before, err := s.fingerprint(ctx)
	if err != nil {
		return err
	}
	txn, err := s.store.Begin(ctx, s.sub.Name)
	if err != nil {
		return err
	}
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, txn.Abort())
		}
	}()
	if err := s.planDisks(ctx, txn, need); err != nil {
		return err
	}
	defer func() {
		if !committed {
			err = errors.Join(err, s.disks.Drop(ctx))
		}
	}()
	if err := s.openWriter(ctx, txn, blocks); err != nil {
		return err
	}
	finished := false
	defer func() {
		if !finished {
			s.writer.Abort()
		}
	}()
	hot, err := s.capture(ctx)
	if err != nil {
		return err
	}
	if after, err := s.fingerprint(ctx); err != nil {
		return err
	} else if after != before {
		return problem.New(problem.Busy, "checkpoint", s.object, "the machine's devices or memory changed while it was taken").
			WithHint("take it again")
	}
	if err := s.unmigrated(ctx); err != nil {
		return err
	}
	s.o.tell("commit", 0, "making it durable")
	finished = true
	s.res.Image = s.writer.Progress()
	sum, err := s.writer.Finish(ctx)
	if err != nil {
		return err
	}
	disks, err := s.disks.Seal(ctx)
	if err != nil {
		return err
	}
	m := s.manifest(sum, hot, append(disks, s.left...), time.Since(begin))
	if err := txn.Commit(ctx, m); err != nil {
		return err
	}
	committed = true
	if s.o.Track != nil && s.engine == EngineBPF {
		s.o.Track.marks.Checkpoint = m.ID
	}
	if err := s.disks.Keep(ctx); err != nil {
		// The checkpoint exists; what is left costs a little memory in QEMU and is
		// removed by the next one.
		s.o.tell("disks", 0, "%v", err)
	}
	s.res.Manifest = m
	return nil
}

// neededBytes estimates what the checkpoint will store: the pages with content
// now, their entries and the device state.
func (s *session) neededBytes() (uint64, error) {
	var need uint64 = 16 << 20
	for i := range s.src.Blocks() {
		if b := s.src.Block(i); b.Whole { // what is not mapped of it is zeros, as a rule
			if err := s.src.Held(i, 0, b.Pages, func(_, n uint64) { need += n * (16 + source.PageBytes) }); err != nil {
				return 0, problem.New(problem.Failed, "read RAM", s.object, "%w", err)
			}
			continue
		}
		err := s.src.Each(i, func(r source.Run) {
			need += r.Pages * 16
			if !r.Zero {
				need += r.Pages * source.PageBytes
			}
		})
		if err != nil {
			return 0, problem.New(problem.Failed, "read RAM", s.object, "%w", err)
		}
	}
	return need, nil
}

// capture gets RAM and device state of one instant into the image and returns
// the pages the guest wrote first afterwards.
func (s *session) capture(ctx context.Context) (hot image.HotRuns, err error) {
	w, err := startWatch(ctx, s)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(w.explain(s, err), w.close(ctx)) }()

	var inside func(context.Context) error
	var after func(context.Context) error
	if s.mode != COW {
		if err := s.track(nil); err != nil {
			return nil, err
		}
	}
	switch s.mode {
	case COW:
		begin := time.Now()
		if err := w.cow.prearm(ctx, s); err != nil {
			return nil, err
		}
		s.o.tell("prearm", time.Since(begin), "RAM is protected, the guest runs")
		inside = func(ctx context.Context) error {
			if w.cow.throttled {
				w.control.SigStopped.Store(1)
			}
			if err := w.cow.srv.Freeze(ctx); err != nil {
				return s.captureError("freeze RAM", err)
			}
			return nil
		}
		after = func(ctx context.Context) error {
			err := w.cow.finish(ctx, s)
			s.res.Capture = w.cow.srv.Stats()
			if w.cow.d != nil {
				hot = w.cow.d.hot
			}
			return err
		}
	case Buffer:
		buf, err := newPageBuffer(ctx, s.src, s.o.BufferBytes)
		if err != nil {
			return nil, err
		}
		defer buf.free()
		inside = func(ctx context.Context) error {
			written, err := s.written(ctx)
			if err != nil {
				return err
			}
			return buf.fill(ctx, s.src, written)
		}
		after = func(ctx context.Context) error { return buf.write(ctx, s.writer, s.o.pace) }
	default:
		d := &direct{workers: directThreads(spareProcessors())}
		defer d.join()
		inside = func(ctx context.Context) error {
			written, err := s.written(ctx)
			if err != nil {
				return err
			}
			return d.run(ctx, storeStall, func(ctx context.Context) error { return d.write(ctx, s.src, s.writer, written) })
		}
		after = func(context.Context) error { return nil }
	}
	defer func() {
		if err != nil { // while the guardian still watches
			err = errors.Join(err, s.disks.Drop(ctx))
		}
	}()
	if err := s.disks.Prepare(ctx); err != nil {
		return nil, err
	}
	if _, err := s.target.FlushDisks(ctx); err != nil {
		return nil, err
	}
	p, err := newPause(ctx, s.target.QMP, s.target.Process, s.object, w)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.close(ctx)) }()
	p.disks, p.confirm = s.disks.Requests(), s.disks.Confirm
	if err := w.healthy(); err != nil {
		return nil, err
	}
	// Late, so that hardly anything comes between this and the pause; what does is
	// found before the checkpoint is committed.
	if err := s.unmigrated(ctx); err != nil {
		return nil, err
	}
	undo, err := s.quiesce(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, undo()) }()
	balloon, err := s.watchBalloon(ctx)
	if err != nil {
		return nil, err
	}
	defer balloon.close()
	if w.cow != nil { // last, so that little is dirty when the guest stops
		if err := w.cow.srv.Rearm(ctx); err != nil {
			return nil, s.captureError("arm RAM", err)
		}
	}
	s.o.tell("stop", 0, "the guest is stopped")
	s.res.Timing, err = p.run(ctx, inside)
	if err = errors.Join(err, undo()); err != nil {
		return nil, err
	}
	s.o.tell("resume", time.Duration(s.res.Timing.PauseNS), "the guest runs again")
	// At once: until it is copied, what the guest overwrites takes memory.
	if err := s.disks.Start(ctx); err != nil {
		return nil, err
	}
	if err := s.writer.WriteDeviceState(p.state); err != nil {
		return nil, err
	}
	if err := after(ctx); err != nil {
		return nil, err
	}
	if err := balloon.broken(ctx, s); err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := s.disks.Wait(ctx); err != nil {
		return nil, err
	}
	if err := s.disks.Finish(ctx); err != nil {
		return nil, err
	}
	s.o.tell("disks", time.Since(begin), "copied")
	return hot, nil
}

// quiesce brings the guest to rest. What it returns may be called again.
func (s *session) quiesce(ctx context.Context) (undo func() error, err error) {
	nothing := func() error { return nil }
	if s.o.Quiesce == nil {
		return nothing, nil
	}
	begin := time.Now()
	wake, err := s.o.Quiesce(ctx)
	if err != nil {
		return nothing, err
	}
	s.o.tell("quiesce", time.Since(begin), "the guest's file systems are frozen")
	// What the guest wrote back for it is not to be left to the pause.
	if _, err := s.target.FlushDisks(ctx); err != nil {
		return nothing, errors.Join(err, wake())
	}
	done := false
	return func() error {
		if done {
			return nil
		}
		done = true
		return wake()
	}, nil
}

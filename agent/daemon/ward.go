package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
)

// Waits between two attempts to attach to a VM that is taken up, such as one whose
// restore is not drained yet.
const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// ward is a VM that the daemon protects.
type ward struct {
	d    *Daemon
	name string

	ready   chan struct{} // closed when it is attached to, or never will be
	leave   chan struct{} // closed when it is to be detached
	leaving sync.Once
	done    chan struct{} // closed when tend has returned

	takenUp bool    // belongs to tend
	before  *Record // of a VM of this name that is gone; nil: there was none
	putBack bool    // it has its record again; belongs to tend

	dirty atomic.Pointer[sampled] // nil: not sampled yet

	setting sync.Mutex // held while the policy is replaced; before keep

	keep sync.Mutex // held while the record is written; before mu
	mu   sync.Mutex
	rec  Record
	lost bool             // the record is to be kept no longer
	p    *agent.Protector // nil while it is not attached to
	err  error            // why it is not
}

func newWard(d *Daemon, r Record, takenUp bool) *ward {
	return &ward{d: d, name: r.Name, rec: r, takenUp: takenUp, ready: make(chan struct{}), leave: make(chan struct{}), done: make(chan struct{})}
}

// record is a copy of the VM's.
func (w *ward) record() Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rec
}

func (w *ward) pid() int { return w.record().PID }

// change changes the record, here and on disk.
func (w *ward) change(f func(*Record)) error {
	w.keep.Lock()
	defer w.keep.Unlock()
	w.mu.Lock()
	f(&w.rec)
	r, lost := w.rec, w.lost
	w.mu.Unlock()
	if lost {
		return nil
	}
	return w.d.state.Save(r)
}

// note is change where nobody waits for the outcome.
func (w *ward) note(log *slog.Logger, f func(*Record)) {
	if err := w.change(f); err != nil {
		log.Error("state is not kept: a daemon that starts now would not know", "error", err)
	}
}

// forget takes the record away.
func (w *ward) forget() error {
	w.keep.Lock()
	defer w.keep.Unlock()
	w.mu.Lock()
	w.lost = true
	w.mu.Unlock()
	return w.d.state.Remove(w.name)
}

// giveUp forgets a VM that could not be attached to. One that is gone and had the name
// before has it again: it is still to be restored.
func (w *ward) giveUp() error {
	w.keep.Lock()
	defer w.keep.Unlock()
	w.mu.Lock()
	forgotten := w.lost // by who detached it, with all that was known of the name
	w.lost = true
	w.mu.Unlock()
	if w.before == nil || forgotten {
		return w.d.state.Remove(w.name)
	}
	w.putBack = true
	return w.d.state.Save(*w.before)
}

// protector is nil while the VM is not attached to.
func (w *ward) protector() *agent.Protector {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.p
}

func (w *ward) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *ward) set(p *agent.Protector, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.p, w.err = p, err
}

// tend protects the VM until it is gone, detached, or the daemon ends.
func (w *ward) tend(ctx context.Context) {
	defer close(w.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	over := make(chan struct{})
	defer close(over)
	wg.Go(func() {
		select {
		case <-w.leave:
			cancel()
		case <-over:
		}
	})
	first := sync.OnceFunc(func() { close(w.ready) })
	defer first()
	for again := true; again; {
		again = w.protect(ctx, first)
		w.takenUp = true // by us, after a restore
	}
}

// protect attaches to the VM and protects it; again: as another process, since it was
// restored.
func (w *ward) protect(ctx context.Context, first func()) (again bool) {
	r := w.record()
	log := w.d.log.With("vm", w.name, "qemu_pid", r.PID)
	if err := w.change(func(*Record) {}); err != nil {
		if !w.takenUp {
			w.set(nil, err)
			return false
		}
		// It was protected before, and a state directory that is full for a while is no
		// reason to leave it alone: what is on disk leads the next daemon to it as well.
		log.Error("state is not kept", "error", err)
	}
	v, p, slot, err := w.attach(ctx, log)
	if err != nil {
		w.set(nil, err)
		w.unattached(ctx, log)
		return false
	}
	defer slot.Close()
	w.set(p, nil)
	log.Info("protected", "policy", slot.Status().Policy)
	first()
	stopRehearsing, stopSampling := w.rehearseOnSchedule(ctx, log), w.sampleOnSchedule(ctx, log, p)
	err = p.Run(ctx)
	stopRehearsing()
	stopSampling()
	if closed := v.Close(); closed != nil {
		log.Warn("let go with an error", "error", closed)
	}
	w.set(nil, err)
	next, ending := p.Successor(), p.Ending()
	switch {
	case next != 0:
		log.Info("brought back", "new_pid", next)
		w.note(log, func(r *Record) { r.Adopt(next) })
		return true
	case ending != nil:
		w.note(log, func(r *Record) { r.Ending = ending })
	case ctx.Err() == nil: // detached, or what can never succeed
		if err != nil {
			log.Error("no longer protected", "error", err)
		}
		err = w.forget()
		if err != nil {
			log.Error("state is not kept", "error", err)
		}
	}
	return false
}

// unattached says what becomes of a VM that could not be attached to.
func (w *ward) unattached(ctx context.Context, log *slog.Logger) {
	switch {
	case !w.takenUp:
		if err := w.giveUp(); err != nil { // whoever asked is told why
			log.Error("state is not kept", "error", err)
		}
	case ctx.Err() == nil && !w.record().Alive():
		w.note(log, func(r *Record) {
			r.Ending = &apipb.Ending{How: "unknown", Detail: "it ended before it was attached to again", AtNs: time.Now().UnixNano()}
		})
	}
}

// attach takes hold of the VM. One that is taken up is tried until it succeeds: it was
// protected before, and whoever asked for that is gone.
func (w *ward) attach(ctx context.Context, log *slog.Logger) (v *agent.VM, p *agent.Protector, slot *plugins.Slot, err error) {
	retry := firstRetry
	for {
		v, p, slot, err = w.attachOnce(ctx, log)
		if err == nil || !w.takenUp || ctx.Err() != nil || !w.record().Alive() || problem.Is(err, problem.Usage) {
			return v, p, slot, err
		}
		if w.failure() == nil {
			log.Warn("not taken up yet", "error", err)
		}
		w.set(nil, err)
		t := time.NewTimer(retry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, nil, nil, err
		}
		retry = min(2*retry, lastRetry)
	}
}

func (w *ward) attachOnce(ctx context.Context, log *slog.Logger) (_ *agent.VM, _ *agent.Protector, _ *plugins.Slot, err error) {
	rec := w.record()
	spec := rec.Spec
	ao, prot, err := agent.Planned(spec)
	if err != nil {
		return nil, nil, nil, err
	}
	ao.Name, ao.Apart, ao.Self = w.name, true, w.d.deps.Self
	st, err := store.Open(spec.GetStore())
	if err != nil {
		return nil, nil, nil, err
	}
	slot, err := plugins.NewSlot(plugins.SlotConfig{Registry: w.d.registry, Host: w.d.deps.PolicyHost,
		Interval: time.Duration(spec.GetIntervalNs()), Changed: func(s plugins.Status) { logPolicy(log, s) }})
	if err != nil {
		return nil, nil, nil, err
	}
	v, err := agent.Attach(ctx, rec.PID, ao)
	if err != nil {
		slot.Close()
		return nil, nil, nil, err
	}
	w.d.limits.apply(&prot)
	prot.Slot = slot
	prot.Proven = rec.Proven
	prot.Measure = func(s *policy.Signals) { w.d.measure(rec.PID, s) }
	prot.Taken = func(r *capture.Result) {
		log.Info("checkpoint", "id", r.Manifest.ID, "pause", time.Duration(r.Manifest.Stats.PauseNS), "total", time.Duration(r.Manifest.Stats.TotalNS))
		if !w.record().Proven {
			w.note(log, func(r *Record) { r.Proven = true })
		}
	}
	prot.Failed = func(err error) { log.Error("checkpoint failed", "code", problem.CodeOf(err), "error", err) }
	prot.Decided = func(v plugins.Verdict) {
		log.Debug("decision", "policy", v.Policy, "generation", v.Generation, "source", v.Source, "reason", v.Decision.GetReason())
	}
	prot.Died = func(e *apipb.Ending) {
		log.Warn("a protected VM is gone", "how", e.GetHow(), "detail", e.GetDetail(), "hint", "ckagent restore "+w.name)
	}
	prot.Revive = func(ctx context.Context) (int, error) { return w.d.restore(ctx, log, w.name, spec.GetStore()) }
	p := v.Protect(st, prot)
	ref := spec.GetPolicy()
	switch {
	case ref == "":
	case w.takenUp: // better the fallback than nobody until it serves
		p.InsistOnPolicy(ctx, ref, spec.GetParams())
	default:
		if _, err := p.SetPolicy(ctx, ref, spec.GetParams()); err != nil {
			slot.Close()
			return nil, nil, nil, errors.Join(err, v.Close())
		}
	}
	return v, p, slot, nil
}

// setPolicy replaces the VM's policy, and keeps that for the next daemon: of two at the same
// time the one that is in charge is kept.
func (w *ward) setPolicy(ctx context.Context, p *agent.Protector, ref string, params map[string]string) (plugins.Verdict, error) {
	w.setting.Lock()
	defer w.setting.Unlock()
	v, err := p.SetPolicy(ctx, ref, params)
	if err != nil {
		return v, err
	}
	return v, w.change(func(r *Record) {
		r.Spec = proto.CloneOf(r.Spec)
		r.Spec.Policy, r.Spec.Params = ref, params
	})
}

// status is the VM's, attached to or not.
func (w *ward) status() *apipb.VMStatus {
	w.mu.Lock()
	p, err, r := w.p, w.err, w.rec
	w.mu.Unlock()
	var s *apipb.VMStatus
	if p != nil {
		s = p.Status()
	} else {
		s = &apipb.VMStatus{Vm: w.name, QemuPid: int32(r.PID), State: "attaching"}
		if err != nil {
			s.Degraded, s.LastError = []string{"not attached: " + err.Error()}, err.Error()
		}
	}
	if x := r.Rehearsal; x != nil && !x.GetOk() {
		s.Degraded = append(s.Degraded, "rehearsal failed: "+x.GetError())
	}
	s.Store, s.OnDeath, s.Rehearsal = r.Spec.GetStore(), r.Spec.GetOnDeath(), r.Rehearsal
	return s
}

// detach lets the VM go, and returns when nothing of ours is left there.
func (w *ward) detach(ctx context.Context) error {
	// Forgotten first: a daemon that is killed in between is not to take it up again.
	err := w.forget()
	w.leaving.Do(func() { close(w.leave) })
	select {
	case <-w.done:
		return err
	case <-ctx.Done():
		return errors.Join(err, ctx.Err())
	}
}

func logPolicy(log *slog.Logger, s plugins.Status) {
	if s.Trouble != nil {
		log.Error("policy does not serve", "wanted", s.Wanted, "in_charge", s.Policy, "error", s.Trouble)
		return
	}
	log.Info("policy in charge", "policy", s.Policy, "generation", s.Generation, "sha256", s.SHA256)
}

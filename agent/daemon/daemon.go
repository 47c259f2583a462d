package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

// Deps is what a daemon needs from above its package.
type Deps struct {
	Log        *slog.Logger
	PolicyHost *plugins.Host
	// Self is the command line of ckagent, of which restores and checkpoints are children;
	// empty: this binary.
	Self []string
	// Watch makes the watcher behind Top, the metrics and what policies are told of a VM.
	// It may take a while, for which no VM waits; nil: there is none of these.
	Watch func(ctx context.Context) *signals.Watcher
	// Try has engine bpf tried on this host where it was not, by another process; an error
	// is that it is still not known whether it can be trusted. nil: nobody tries it.
	Try func(ctx context.Context) error
}

// Daemon protects the VMs of a host.
type Daemon struct {
	cfg      Config
	deps     Deps
	log      *slog.Logger
	state    *State
	limits   *limits
	registry *plugins.Registry
	watch    atomic.Pointer[signals.Watcher] // nil until it is made
	boot     string

	ctx  context.Context // of the wards: ends with stop
	stop context.CancelFunc
	wg   sync.WaitGroup // wards, and tryEngine

	mu    sync.Mutex
	ended bool
	wards map[string]*ward // by name
	gone  map[string]Record
}

// New takes the state directory. Close gives it back, if Run is never called.
func New(cfg Config, deps Deps) (*Daemon, error) {
	st, err := OpenState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	d := &Daemon{cfg: cfg, deps: deps, log: deps.Log, state: st, limits: newLimits(cfg.Limits), registry: plugins.NewRegistry(cfg.PolicyDir),
		boot: BootID(), wards: map[string]*ward{}, gone: map[string]Record{}}
	d.ctx, d.stop = context.WithCancel(context.Background())
	return d, nil
}

// Close gives the state directory back.
func (d *Daemon) Close() error {
	d.stop()
	return d.state.Close()
}

// Run serves until ctx ends. The VMs are let go then, and taken up by the next daemon.
func (d *Daemon) Run(ctx context.Context) (err error) {
	defer func() {
		d.mu.Lock()
		d.ended = true
		d.mu.Unlock()
		d.stop()
		d.wg.Wait()
		err = errors.Join(err, d.state.Close())
	}()
	servers, err := d.listen(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, servers.close()) }()
	if err := d.takeUp(); err != nil {
		d.log.Error("some VMs are not taken up", "error", err)
	}
	if d.deps.Try != nil {
		d.wg.Go(func() { d.tryEngine(d.ctx, trialWaits) })
	}
	return servers.run(ctx)
}

// takeUp protects again what the last daemon protected.
func (d *Daemon) takeUp() error {
	records, err := d.state.Read()
	for _, r := range records {
		if r.Ending != nil || !r.Alive() {
			d.lost(r)
			continue
		}
		if _, e := d.admit(r, true); e != nil {
			err = errors.Join(err, e)
		}
	}
	return err
}

// lost notes a VM that is gone. How it ended while nobody looked is not known.
func (d *Daemon) lost(r Record) {
	if r.Ending == nil {
		r.Ending = &apipb.Ending{How: "unknown", Detail: "it ended while no daemon ran", AtNs: time.Now().UnixNano()}
		if r.BootID != d.boot {
			r.Ending.How, r.Ending.Detail = "host", "the host has booted since"
		}
		if err := d.state.Save(r); err != nil {
			d.log.Error("state is not kept", "vm", r.Name, "error", err)
		}
		if r.Spec.GetOnDeath() != "none" {
			d.log.Warn("a protected VM is gone", "vm", r.Name, "how", r.Ending.GetHow(), "detail", r.Ending.GetDetail(), "hint", "ckagent restore "+r.Name+", or restore --all")
		}
	}
	d.mu.Lock()
	d.gone[r.Name] = r
	d.mu.Unlock()
}

// admit begins to protect a VM. If it is taken up, its attach is tried until it
// succeeds or the VM is gone.
func (d *Daemon) admit(r Record, takenUp bool) (*ward, error) {
	w := newWard(d, r, takenUp)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return nil, problem.New(problem.Busy, "attach", "VM "+r.Name, "the daemon ends")
	}
	if other := d.wards[r.Name]; other != nil {
		return nil, problem.New(problem.Busy, "attach", "VM "+r.Name, "a VM of this name is protected: pid %d", other.pid()).
			WithHint("detach that one, or give this one another --name")
	}
	if before, ok := d.gone[r.Name]; ok {
		w.before = &before
		delete(d.gone, r.Name)
	}
	d.wards[r.Name] = w
	d.wg.Go(func() {
		w.tend(d.ctx)
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.wards, r.Name)
		if last := w.record(); last.Ending != nil {
			d.gone[r.Name] = last
		} else if w.putBack {
			d.gone[r.Name] = *w.before
		}
	})
	return w, nil
}

// all lists the wards by name.
func (d *Daemon) all() []*ward {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*ward, 0, len(d.wards))
	for _, w := range d.wards {
		list = append(list, w)
	}
	slices.SortFunc(list, func(a, b *ward) int { return strings.Compare(a.name, b.name) })
	return list
}

// protectors lists those of the VMs that are attached to.
func (d *Daemon) protectors() []*agent.Protector {
	var list []*agent.Protector
	for _, w := range d.all() {
		if p := w.protector(); p != nil {
			list = append(list, p)
		}
	}
	return list
}

// departed lists the VMs that are gone, by name.
func (d *Daemon) departed() []Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]Record, 0, len(d.gone))
	for _, r := range d.gone {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// forgetGone forgets a VM that is gone, if there is such a one.
func (d *Daemon) forgetGone(ref string) (found bool, err error) {
	for _, r := range d.departed() {
		if !agent.Names(ref, r.Name, r.PID) {
			continue
		}
		if err := d.state.Remove(r.Name); err != nil {
			return true, err // or it is back with the next daemon
		}
		d.mu.Lock()
		delete(d.gone, r.Name)
		d.mu.Unlock()
		return true, nil
	}
	return false, nil
}

// complete fills in what an attach left open.
func (d *Daemon) complete(s *apipb.Spec) *apipb.Spec {
	s = proto.CloneOf(s)
	if s == nil {
		s = &apipb.Spec{}
	}
	def := d.cfg.Defaults
	orElse(&s.Store, def.Store)
	orElse(&s.OnDeath, def.OnDeath)
	if s.KeepLast == nil {
		s.KeepLast = proto.Int32(int32(def.KeepLast))
	}
	if s.GetPolicy() == "" && s.GetIntervalNs() == 0 {
		s.Policy = def.Policy
		// The one that nobody named need not be installed.
		if _, err := d.registry.Lookup(shipped.Default); s.Policy == "" && err == nil {
			s.Policy = shipped.Default
		}
	}
	orElse(&s.IntervalNs, int64(def.Interval))
	orElse(&s.RehearseEveryNs, int64(d.cfg.Rehearsal.Every))
	return s
}

func orElse[T comparable](v *T, fallback T) {
	if *v == *new(T) {
		*v = fallback
	}
}

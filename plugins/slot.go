package plugins

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

// SlotConfig is what a slot needs.
type SlotConfig struct {
	Registry *Registry
	Host     *Host
	// Interval is the operator's, which the fallback keeps.
	Interval time.Duration
	// MaxFailures in a row cost a program its place.
	MaxFailures int
	// HealthEvery is how often a program is asked whether it serves.
	HealthEvery time.Duration
	// FirstRestart is the wait before a program that lost its place is started
	// again; it doubles up to LastRestart.
	FirstRestart, LastRestart time.Duration
	// Changed is told, without a lock held, when another generation or the fallback
	// is in charge; nil: nobody is.
	Changed func(Status)
}

func (c *SlotConfig) defaults() {
	setDefault(&c.Interval, 15*time.Minute)
	setDefault(&c.MaxFailures, 3)
	setDefault(&c.HealthEvery, 5*time.Second)
	setDefault(&c.FirstRestart, time.Second)
	setDefault(&c.LastRestart, 5*time.Minute)
	if c.Host == nil {
		c.Host = &Host{}
	}
	if c.Registry == nil {
		c.Registry = NewRegistry("")
	}
	if c.Changed == nil {
		c.Changed = func(Status) {}
	}
}

func setDefault[T comparable](v *T, fallback T) {
	if *v == *new(T) {
		*v = fallback
	}
}

// Slot is the place of one VM's policy.
type Slot struct {
	cfg      SlotConfig
	fallback policy.Policy
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	changes chan struct{} // has room for one

	change sync.Mutex // whoever replaces the generation; before mu

	mu        sync.Mutex
	closed    bool
	want      *wanted // nil: the fallback is what was asked for
	current   *lease  // nil: the fallback is in charge
	number    uint64  // of the last generation
	trouble   error
	last      *Verdict        // the program's last valid decision
	lastFor   int64           // the newest checkpoint it knew of
	signals   *policy.Signals // the newest, for the probe of a restart
	decisions uint64
}

// wanted is what an operator set.
type wanted struct {
	ref      string
	params   map[string]string
	replaced chan struct{} // closed when something else was set
	losses   int           // in a row
}

func newWanted(ref string, params map[string]string) *wanted {
	return &wanted{ref: ref, params: maps.Clone(params), replaced: make(chan struct{})}
}

// lease is a generation in a slot.
type lease struct {
	*Generation
	number   uint64
	want     *wanted
	failures int           // in a row; Slot.mu
	inFlight int           // Slot.mu
	retired  bool          // Slot.mu
	lost     bool          // retired because of what it did; Slot.mu
	leave    chan struct{} // closed when retired
	idle     chan struct{} // closed when retired and no call is in flight
	ended    chan struct{} // closed when nothing is left of it
}

// NewSlot is a slot with the fallback in charge.
func NewSlot(cfg SlotConfig) (*Slot, error) {
	cfg.defaults()
	f, err := shipped.NewFixed(map[string]string{"interval": cfg.Interval.String()})
	if err != nil {
		return nil, problem.New(problem.Usage, "set policy", "fixed", "%w", err)
	}
	s := &Slot{cfg: cfg, fallback: f, changes: make(chan struct{}, 1)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Set puts a policy in charge: it is started, describes itself, decides once on the
// signals, and takes the place of the one that is there, which ends. On failure
// everything stays as it is. It returns the first decision.
func (s *Slot) Set(ctx context.Context, ref string, params map[string]string, signals *policy.Signals) (Verdict, error) {
	s.change.Lock()
	defer s.change.Unlock()
	v, err := s.switchTo(ctx, newWanted(ref, params), signals)
	if err != nil {
		return Verdict{}, setError(ref, err)
	}
	return v, nil
}

func setError(ref string, err error) error {
	const op = "set policy"
	switch {
	case errors.Is(err, ErrParams):
		return problem.New(problem.Usage, op, ref, "%w", err).WithHint("ckagent policy describe %s", ref)
	case errors.Is(err, policy.ErrUnsupported):
		return problem.New(problem.Refused, op, ref, "%w", err).WithHint("the policy before it stays; choose one that this host supports")
	case errors.Is(err, ErrChecksum):
		return problem.New(problem.Integrity, op, ref, "%w", err).WithHint("install it again: ckagent policy install PATH")
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err // it says it all
	}
	return problem.New(problem.CodeOf(err), op, ref, "%w", err).WithHint("the policy before it stays")
}

// switchTo starts what is wanted and puts it in charge. change is held.
func (s *Slot) switchTo(ctx context.Context, w *wanted, signals *policy.Signals) (Verdict, error) {
	// It ends with the slot as well.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	p, err := s.cfg.Registry.Lookup(w.ref)
	if err != nil {
		return Verdict{}, err
	}
	g, err := s.cfg.Host.Start(ctx, p, w.params)
	if err != nil {
		return Verdict{}, err
	}
	began := time.Now()
	d, err := s.probe(ctx, g, signals)
	if err != nil {
		g.End()
		return Verdict{}, fmt.Errorf("its first decision: %w", g.quote(err))
	}
	l := &lease{Generation: g, want: w, leave: make(chan struct{}), idle: make(chan struct{}), ended: make(chan struct{})}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		g.End()
		return Verdict{}, context.Canceled
	}
	if s.want != nil && s.want != w {
		close(s.want.replaced)
	}
	s.number++
	l.number = s.number
	old := s.current
	s.want, s.current, s.trouble = w, l, nil
	v := Verdict{Decision: d, Source: FromProgram, Policy: p.Name, Generation: l.number, SHA256: p.SHA256, Took: time.Since(began)}
	s.keep(v, signals)
	s.retire(old, false)
	st := s.status()
	s.wg.Go(func() { s.own(l) })
	s.mu.Unlock()
	if old != nil {
		<-old.ended
	}
	s.changed(st)
	return v, nil
}

// probe has a new generation decide once. An answer that is late is asked for again, as
// often as one in charge may be late: on a host that has just booted, or swaps the policies
// of many VMs, the first takes longer than the others will.
func (s *Slot) probe(ctx context.Context, g *Generation, signals *policy.Signals) (*policy.Decision, error) {
	has := signals.GetCapabilities().GetModes()
	if asks := g.Description.GetModes(); len(asks) > 0 && !anyOf(asks, has) {
		return nil, fmt.Errorf("%w: it needs one of the modes %q (this host has %q)", policy.ErrUnsupported, asks, has)
	}
	for n := 1; ; n++ {
		d, err := g.Decide(ctx, signals)
		if !errors.Is(err, ErrSlow) || n >= s.cfg.MaxFailures || ctx.Err() != nil {
			return d, err
		}
	}
}

func anyOf(asks, has []string) bool {
	for _, a := range asks {
		for _, h := range has {
			if a == h {
				return true
			}
		}
	}
	return false
}

// keep remembers a program's valid decision. mu is held.
func (s *Slot) keep(v Verdict, signals *policy.Signals) {
	s.last, s.lastFor, s.signals = &v, newest(signals), signals
	s.decisions++
}

// newest is the time of the last checkpoint that signals know of.
func newest(signals *policy.Signals) int64 {
	if h := signals.GetHistory(); len(h) > 0 {
		return h[len(h)-1].GetAtNs()
	}
	return 0
}

// retire takes a generation out of service. mu is held.
func (s *Slot) retire(l *lease, lost bool) {
	if l == nil || l.retired {
		return
	}
	l.retired, l.lost = true, lost
	close(l.leave)
	if l.inFlight == 0 {
		close(l.idle)
	}
}

// Decide never fails: if the program does, but keeps its place, it is its last valid
// decision as long as no checkpoint was taken on it, and else the fallback's. It takes
// policy.Deadline at most. The signals are not to be changed afterwards.
func (s *Slot) Decide(ctx context.Context, signals *policy.Signals) Verdict {
	began := time.Now()
	s.mu.Lock()
	l := s.current
	if l != nil {
		l.inFlight++
	}
	s.signals = signals
	s.mu.Unlock()
	if l == nil {
		return s.without(signals, began, false, nil)
	}
	d, err := l.Decide(ctx, signals)
	var lost *Status
	s.mu.Lock()
	if l.inFlight--; l.inFlight == 0 && l.retired {
		close(l.idle)
	}
	switch {
	case err == nil:
		l.failures = 0
		v := Verdict{Decision: d, Source: FromProgram, Policy: l.Program.Name, Generation: l.number, SHA256: l.Program.SHA256, Took: time.Since(began)}
		if s.current == l {
			s.trouble = nil
			s.keep(v, signals)
		} else {
			s.decisions++ // N+1 has decided since
		}
		s.mu.Unlock()
		return v
	case ctx.Err() == nil:
		lost = s.failed(l, err)
	}
	s.mu.Unlock()
	if lost != nil {
		s.changed(*lost)
	}
	return s.without(signals, began, lost == nil, err)
}

// failed counts a failure of a generation, and ends its service if there were too
// many. If it stays it is asked again at once: what is decided without it may hold for
// the whole of the fallback's interval. mu is held.
func (s *Slot) failed(l *lease, err error) (lost *Status) {
	if s.current != l {
		return nil
	}
	s.trouble = err
	if l.failures++; l.failures < s.cfg.MaxFailures && l.PID() != 0 {
		s.again()
		return nil
	}
	s.current = nil
	s.retire(l, true)
	st := s.status()
	return &st
}

// without decides without the program, on its last decision if it keeps its place.
func (s *Slot) without(signals *policy.Signals, began time.Time, inPlace bool, err error) Verdict {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decisions++
	if err == nil {
		err = s.trouble
	}
	if v := s.last; v != nil && inPlace && s.lastFor == newest(signals) && policy.Check(signals, v.Decision) == nil {
		again := *v
		again.Source, again.Trouble, again.Took = FromLast, err, time.Since(began)
		return again
	}
	d, ferr := s.fallback.Decide(signals)
	if ferr == nil {
		ferr = policy.Check(signals, d)
	}
	if ferr != nil { // signals that make no sense at all: protect rather than not
		d = policy.Now("the signals make no sense: " + strings.ToValidUTF8(ferr.Error()[:min(len(ferr.Error()), 200)], ""))
	}
	if s.want != nil {
		d = proto.CloneOf(d)
		d.Reason = fmt.Sprintf("policy %s does not serve; %s", s.want.ref, d.GetReason())
	}
	return Verdict{Decision: d, Source: FromFallback, Policy: fallbackName, Trouble: err, Took: time.Since(began)}
}

// fallbackName is the built-in policy's.
const fallbackName = "fixed"

// Changes gets a value whenever another generation or the fallback is in charge, and when
// the program in charge missed an answer: what was decided before is to be decided again.
func (s *Slot) Changes() <-chan struct{} { return s.changes }

func (s *Slot) changed(st Status) {
	s.cfg.Changed(st)
	s.again()
}

// again has a decision asked for.
func (s *Slot) again() {
	select {
	case s.changes <- struct{}{}:
	default: // nobody has looked since the last one
	}
}

// Status is the slot's now.
func (s *Slot) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status()
}

func (s *Slot) status() Status {
	st := Status{Policy: fallbackName, Wanted: fallbackName, Trouble: s.trouble, Decisions: s.decisions,
		Params: map[string]string{"interval": s.cfg.Interval.String()}}
	if s.want != nil {
		st.Wanted = s.want.ref
	}
	if l := s.current; l != nil {
		st.Policy, st.Path, st.SHA256, st.Generation = l.Program.Name, l.Program.Path, l.Program.SHA256, l.number
		st.Wanted, st.Params, st.PID, st.Description = l.Program.Name, maps.Clone(l.Params), l.PID(), l.Description
	}
	return st
}

// Close ends the program and everything of the slot. Decide may still be called: the
// fallback answers.
func (s *Slot) Close() {
	s.cancel()
	s.change.Lock() // after whoever starts a program
	s.mu.Lock()
	s.closed = true
	s.retire(s.current, false)
	s.current, s.want = nil, nil
	s.mu.Unlock()
	s.change.Unlock()
	s.wg.Wait()
}

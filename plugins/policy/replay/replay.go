package replay

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

// Model is what checkpoints cost where the trace tells of none that were taken.
type Model struct {
	Fixed   time.Duration // of the guest's work, whatever it writes
	PerPage time.Duration // more for each page that is written before it was copied
	// StoreBytesPerSecond holds where the trace does not say.
	StoreBytesPerSecond float64
	// ScanShare is the share of a checkpoint's duration in which it passes over memory; 0: all.
	ScanShare float64
	// FailuresPerSecond replaces the trace's if it is not 0.
	FailuresPerSecond float64
}

// DefaultModel is a pause of some milliseconds and a fault handled in user space.
var DefaultModel = Model{Fixed: 5 * time.Millisecond, PerPage: 10 * time.Microsecond, StoreBytesPerSecond: 200e6}

// Decider is a policy; a *plugins.Generation is one.
type Decider interface {
	Decide(context.Context, *policy.Signals) (*policy.Decision, error)
}

// InProcess makes a Decider of a policy in this process.
type InProcess struct{ policy.Policy }

// Decide implements Decider.
func (p InProcess) Decide(_ context.Context, s *policy.Signals) (*policy.Decision, error) {
	return p.Policy.Decide(s)
}

// Taken is a checkpoint of a replay.
type Taken struct {
	AtNS    int64
	TotalNS int64
	LostNS  int64 // of the guest's work
	Bytes   uint64
	Mode    string
	Reason  string
}

// Result is what a policy would have done.
type Result struct {
	DurationNS  int64
	Decisions   int
	Checkpoints []Taken
	Bytes       uint64
	// Shares of the time: lost to checkpoints, expected to be lost to failures, and
	// both, which is what a policy is measured by.
	Overhead, Exposure, Cost float64
	// MeanLossNS is what a failure at any instant loses on average; MaxLossNS at worst.
	MeanLossNS, MaxLossNS int64
}

const (
	maxSteps  = 1 << 20
	pageBytes = 4096
	history   = 64
)

// ErrEndless is a policy that wants more than can be replayed.
var ErrEndless = errors.New("the policy wants more checkpoints and decisions than can be replayed")

// Run replays a trace.
func Run(ctx context.Context, trace []*policy.Signals, p Decider, m Model) (*Result, error) {
	r := &run{trace: trace, model: m, now: trace[0].GetNowNs(), committed: trace[0].GetNowNs(), res: &Result{}}
	for i := 0; i < len(trace) && r.witness == nil; i++ {
		r.witness = witnessed(trace[i])
	}
	last := len(trace) - 1
	end := trace[last].GetNowNs() + trace[last].GetNowNs() - trace[last-1].GetNowNs() // the last line holds as long as the one before
	for r.now < end {
		if r.res.Decisions++; r.res.Decisions > maxSteps {
			return nil, ErrEndless
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s := r.signals()
		d, err := p.Decide(ctx, s)
		if err == nil {
			err = policy.Check(s, d)
		}
		if err != nil {
			return nil, fmt.Errorf("at %v: %w", time.Duration(r.now-trace[0].GetNowNs()), err)
		}
		r.decision = d
		if at, next := r.when(s, d), r.next(d, end); at < next {
			r.checkpoint(max(at, r.now), d)
		} else {
			r.now = next
		}
	}
	r.finish(end)
	return r.res, nil
}

// run is a replay under way.
type run struct {
	trace []*policy.Signals
	model Model
	at    int // the line that holds
	// witness is the newest checkpoint that the trace has told of; before it tells of any, the
	// first that it will. nil: it tells of none at all.
	witness   *policy.Checkpoint
	now       int64   // ns
	committed int64   // the instant that a failure now goes back to
	exposed   float64 // seconds since the beginning that are accounted for
	aged      float64 // the integral of what a failure would lose, in s^2
	expected  float64 // seconds lost to failures
	decision  *policy.Decision
	history   []*policy.Checkpoint
	res       *Result
}

// signals are the line's, with what happened in the replay.
func (r *run) signals() *policy.Signals {
	for r.at+1 < len(r.trace) && r.trace[r.at+1].GetNowNs() <= r.now {
		r.at++
		if c := witnessed(r.trace[r.at]); c != nil {
			r.witness = c
		}
	}
	line := r.trace[r.at]
	// The parts of a line are not changed by anybody.
	s := &policy.Signals{Vm: line.GetVm(), Memory: line.GetMemory(), Network: line.GetNetwork(), Cpu: line.GetCpu(), Disk: line.GetDisk(),
		Host: line.GetHost(), Capabilities: line.GetCapabilities(), NowNs: r.now, ProtectedSinceNs: r.trace[0].GetNowNs(),
		History: r.history[max(0, len(r.history)-history):], Last: r.decision}
	unknown := !(s.GetHost().GetStoreBytesPerSecond() > 0)
	if unknown || r.witness != nil || r.model.FailuresPerSecond > 0 {
		s.Host = proto.CloneOf(line.GetHost())
		if s.Host == nil {
			s.Host = &policypb.Host{}
		}
		switch {
		case r.witness != nil: // as an agent knows it, which is from what it took
			s.Host.StoreBytesPerSecond = policy.StoreSpeed(r.history)
		case unknown:
			s.Host.StoreBytesPerSecond = r.model.StoreBytesPerSecond
		}
		if r.model.FailuresPerSecond > 0 {
			s.Host.FailuresPerSecond = r.model.FailuresPerSecond
		}
	}
	if n := len(r.history); n > 0 {
		s.LastSuccessNs = r.history[n-1].GetAtNs()
	}
	return s
}

// when is the instant of the checkpoint, MaxInt64 for none.
func (r *run) when(s *policy.Signals, d *policy.Decision) int64 {
	switch slot := d.GetIdleSlot(); {
	case d.GetNow():
		return r.now
	case slot != nil:
		if s.GetNetwork().GetIdle() && s.GetCpu().GetIdle() {
			return min(max(slot.GetNotBeforeNs(), r.now), slot.GetDeadlineNs())
		}
		return slot.GetDeadlineNs()
	case d.GetAtNs() != 0:
		return d.GetAtNs()
	}
	return math.MaxInt64
}

// next is when the policy is asked again if nothing happens.
func (r *run) next(d *policy.Decision, end int64) int64 {
	next := end
	if r.at+1 < len(r.trace) {
		next = min(next, r.trace[r.at+1].GetNowNs())
	}
	if ask := d.GetAskAgainNs(); ask != 0 {
		next = min(next, max(ask, r.now+int64(time.Millisecond)))
	}
	return next
}

// failures is the rate that holds now.
func (r *run) failures() float64 {
	if f := r.model.FailuresPerSecond; f > 0 {
		return f
	}
	return r.trace[r.at].GetHost().GetFailuresPerSecond()
}

func (r *run) checkpoint(at int64, d *policy.Decision) {
	line := r.trace[r.at]
	c, lost := proto.CloneOf(r.witness), 0.0
	if c != nil {
		lost = shipped.Lost(c)
	} else {
		c, lost = r.imagined(line, at)
	}
	c.AtNs, c.Mode = at+c.GetLeadNs(), d.GetMode()
	whole := c.GetAtNs() + c.GetCommitNs()
	// Until it is whole a failure goes back to the one before.
	r.expose(whole)
	r.res.MaxLossNS = max(r.res.MaxLossNS, whole-r.committed)
	r.committed = c.GetAtNs()
	r.history = append(r.history, c)
	r.res.Checkpoints = append(r.res.Checkpoints, Taken{AtNS: c.GetAtNs(), TotalNS: c.GetTotalNs(), LostNS: nanos(lost), Bytes: c.GetStoredBytes(), Mode: d.GetMode(), Reason: d.GetReason()})
	r.res.Bytes += c.GetStoredBytes()
	r.now = max(whole, at+int64(time.Millisecond))
}

// witnessed is the newest checkpoint that a line tells of, as one that is taken while the
// line holds; nil if it tells of none.
func witnessed(line *policy.Signals) *policy.Checkpoint {
	for _, c := range slices.Backward(line.GetHistory()) {
		if !c.GetOk() {
			continue
		}
		c = proto.CloneOf(c)
		c.Id, c.Parent = "", ""
		if c.GetCommitNs() <= 0 {
			c.CommitNs = max(0, c.GetTotalNs()-c.GetLeadNs())
		}
		return c
	}
	return nil
}

// imagined is a checkpoint as the model has it, and the guest's time it takes.
func (r *run) imagined(line *policy.Signals, at int64) (*policy.Checkpoint, float64) {
	curve := shipped.Curve(line)
	store := line.GetHost().GetStoreBytesPerSecond()
	if !(store > 0) {
		store = r.model.StoreBytesPerSecond
	}
	bytes := float64(line.GetVm().GetUsedBytes())
	if n := len(r.history); n > 0 && line.GetCapabilities().GetIncremental() {
		bytes = min(bytes, curve.Dirty(seconds(at-r.history[n-1].GetAtNs()))*pageBytes)
	}
	lost, total, scan := cost(curve, bytes, store, r.model)
	return &policy.Checkpoint{Ok: true, PauseNs: int64(r.model.Fixed), TotalNs: nanos(total), CommitNs: nanos(total), StoredBytes: uint64(bytes), RawBytes: uint64(bytes),
		CapturedPages: uint64(curve.Met(scan)), ScanNs: nanos(scan), WorkLostShare: (lost - r.model.Fixed.Seconds()) / total}, lost
}

// cost is the guest's time that a checkpoint of so many bytes takes, its own, and that of
// its scan.
func cost(curve formula.Curve, bytes, store float64, m Model) (lost, total, scan float64) {
	total = max(bytes/store, m.Fixed.Seconds(), 1e-3)
	if scan = total; m.ScanShare > 0 {
		scan = total * min(m.ScanShare, 1)
	}
	return min(m.Fixed.Seconds()+curve.Met(scan)*m.PerPage.Seconds(), total), total, scan
}

// expose adds up what failures until then would cost.
func (r *run) expose(until int64) {
	from := r.trace[0].GetNowNs() + int64(r.exposed*1e9)
	if until <= from {
		return
	}
	a, b := seconds(from-r.committed), seconds(until-r.committed)
	age := (b*b - a*a) / 2
	r.expected += r.failures() * age
	r.aged += age
	r.exposed = seconds(until - r.trace[0].GetNowNs())
}

func (r *run) finish(end int64) {
	r.expose(max(end, r.now))
	r.res.MaxLossNS = max(r.res.MaxLossNS, end-r.committed)
	duration := r.exposed
	lost := 0.0
	for _, c := range r.res.Checkpoints {
		lost += seconds(c.LostNS)
	}
	r.res.DurationNS = nanos(duration)
	r.res.Overhead, r.res.Exposure = lost/duration, r.expected/duration
	r.res.Cost = r.res.Overhead + r.res.Exposure
	r.res.MeanLossNS = nanos(r.aged / duration)
}

func seconds(ns int64) float64 { return float64(ns) / 1e9 }
func nanos(s float64) int64    { return int64(math.Round(s * 1e9)) }

// BestFixed is the fixed interval between the bounds that would have cost least, in
// hindsight. One longer than the trace is none.
func BestFixed(ctx context.Context, trace []*policy.Signals, m Model, shortest, longest time.Duration) (best *Result, interval time.Duration, err error) {
	longest = min(longest, time.Duration(trace[len(trace)-1].GetNowNs()-trace[0].GetNowNs()))
	const finer = 1.15
	for t := shortest; t > 0 && t <= longest; t = min(time.Duration(float64(t)*finer), max(longest, t+1)) {
		p, err := shipped.NewFixed(map[string]string{"interval": t.String()})
		if err != nil {
			return nil, 0, err
		}
		res, err := Run(ctx, trace, InProcess{p}, m)
		if err != nil {
			return nil, 0, err
		}
		if best == nil || res.Cost < best.Cost {
			best, interval = res, t
		}
	}
	if best == nil {
		return nil, 0, fmt.Errorf("%w: it is shorter than %v", ErrTrace, shortest)
	}
	return best, interval, nil
}

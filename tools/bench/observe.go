package bench

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/bench/report"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// window is how long before and after an operation the guest is looked at.
const window = time.Second

// settle is how long a guest runs before the window begins: it makes up for up to
// 200 ms of writes that it missed.
const settle = 600 * time.Millisecond

// Names of figures; all but the shares and bytes are nanoseconds.
const (
	fPause    = "pause"     // STOP to RESUME
	fGap      = "gap"       // longest silence of the vCPU around it
	fAtPause  = "at_pause"  // the pause as the vCPU's silence shows it
	fCalm     = "calm"      // longest silence in as long a time with nothing going on
	fTotal    = "total"     // command to its end
	fLost     = "lost"      // share of the guest's work
	fLostTime = "lost_time" // the same as time: share times total
	fCPU      = "cpu"       // processor time outside the vCPUs, s
	fHuge     = "huge"      // share of the young guest's huge pages left
	fDevice   = "device"    // saving the device state
	fRest     = "rest"      // pause without it
	fBytes    = "bytes"     // written
	fSpeed    = "speed"     // of capturing, bytes/s
	fDurable  = "durable"   // of capturing, fsync and commit, bytes/s
	fRaw      = "raw"       // of write(2) of as many bytes
	fOwnPause = "own_pause" // what the tool itself says
	fSeenBias = "seen_bias" // share by which the tool's own figure differs from what the guest saw
	fFaults   = "faults"
	fFaultP50 = "fault_p50"
	fFaultP99 = "fault_p99"
)

// figures of one operation.
type figures map[string]float64

// observation is one operation with what was seen of the guest around it.
type observation struct {
	figures figures
	stages  []stage
	gaps    []report.Point // time (s, 0 is the command) and length (ms) of the guest's silences
}

// operation does something to a guest and says what it knows of it.
type operation func(ctx context.Context, g *guest, dir string) (figures, []stage, error)

// measure runs an operation on a guest and looks at what the guest saw.
func (g *guest) measure(ctx context.Context, dir string, op operation) (*observation, error) {
	if err := g.run(ctx); err != nil {
		return nil, err
	}
	if err := wait(ctx, settle); err != nil {
		return nil, err
	}
	idle, err := g.hostCPU()
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, window); err != nil {
		return nil, err
	}
	drainEvents(g.events)
	before, err := g.hostCPU()
	if err != nil {
		return nil, err
	}
	idle = before - idle // in one window
	begin := time.Now()
	figs, stages, err := op(ctx, g, dir)
	end := time.Now()
	if err != nil {
		return nil, err
	}
	after, err := g.hostCPU()
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, window); err != nil {
		return nil, err
	}
	o := &observation{figures: figs, stages: stages}
	// What is scheduled anyway (timers, the console) is no cost of the operation.
	own := (after - before).Seconds() - idle.Seconds()*float64(end.Sub(begin))/float64(window)
	figs[fCPU] += max(0, own)
	if _, known := figs[fTotal]; !known {
		figs[fTotal] = float64(end.Sub(begin))
	}
	stop, resume, err := g.pauseSeen()
	if err != nil {
		return nil, err
	}
	figs[fPause] = float64(resume.Sub(stop))
	if d, ok := figs[fDevice]; ok {
		figs[fRest] = max(0, figs[fPause]-d)
	}
	g.gapSeen(o, begin, end)
	if gap, _, ok := g.Beats().LongestGap(stop, resume); ok {
		// The guest's clock stands still in the pause: the rest of the interval in
		// which it was stopped passes after it. So the silence is the pause and one
		// interval.
		figs[fAtPause] = float64(gap - usualGap(g.Beats().Between(begin.Add(-window), begin)))
	}
	if done, ok := g.work.between(begin, end); ok {
		if usual, ok := g.work.between(begin.Add(-window), begin); ok && usual > 0 {
			figs[fLost] = 1 - done/(usual*float64(end.Sub(begin))/float64(window))
			figs[fLostTime] = max(0, figs[fLost]) * float64(end.Sub(begin))
		}
	}
	left, err := g.hugeBytes()
	if err != nil {
		return nil, err
	}
	if g.huge > 0 {
		figs[fHuge] = float64(left) / float64(g.huge)
	}
	return o, nil
}

// pauseSeen takes the (longest) pause from QEMU's own events.
func (g *guest) pauseSeen() (from, to time.Time, err error) {
	var stop time.Time
	for len(g.events.C()) > 0 {
		switch e := <-g.events.C(); e.Name {
		case "STOP":
			stop = e.Timestamp
		case "RESUME":
			if !stop.IsZero() && e.Timestamp.Sub(stop) > to.Sub(from) {
				from, to = stop, e.Timestamp
			}
		}
	}
	if from.IsZero() {
		return from, to, errors.New("QEMU announced no STOP followed by a RESUME")
	}
	return from, to, nil
}

// gapSeen takes the silences from the heartbeats.
func (g *guest) gapSeen(o *observation, begin, end time.Time) {
	b := g.Beats()
	if gap, _, ok := b.LongestGap(begin.Add(-window), end.Add(window)); ok {
		o.figures[fGap] = float64(gap)
	}
	beats := b.Between(begin.Add(-window), end.Add(window))
	for i := 1; i < len(beats); i++ {
		if d := beats[i].At.Sub(beats[i-1].At); d >= time.Millisecond {
			o.gaps = append(o.gaps, report.Point{X: beats[i-1].At.Sub(begin).Seconds(), Y: d.Seconds() * 1e3})
		}
	}
}

// usualGap is the median time between two beats.
func usualGap(beats []vmtest.Beat) time.Duration {
	if len(beats) < 2 {
		return 0
	}
	var gaps []time.Duration
	for i := 1; i < len(beats); i++ {
		gaps = append(gaps, beats[i].At.Sub(beats[i-1].At))
	}
	slices.Sort(gaps)
	return gaps[len(gaps)/2]
}

// calm is the longest silence of the vCPU within d when nobody does anything to the
// guest: what the guest and the host cause by themselves.
func (g *guest) calm(ctx context.Context, d time.Duration) (ns float64, ok bool, err error) {
	from := time.Now()
	if err := wait(ctx, d); err != nil {
		return 0, false, err
	}
	gap, _, ok := g.Beats().LongestGap(from, time.Now())
	return float64(gap), ok, nil
}

func drainEvents(s *qmp.Subscription) {
	for len(s.C()) > 0 {
		<-s.C()
	}
}
